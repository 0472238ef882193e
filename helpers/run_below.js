// Runs the cells below the panel: in JupyterLab and Notebook 7 by their own menu item, in Notebook 6 by its object.
const shown = [...document.querySelectorAll('.tunebook-panel')].find(panel => panel.offsetParent);
const say = text => {
  const line = document.createElement('div');
  line.setAttribute('role', 'status');
  line.textContent = text;
  element.replaceChildren ? element.replaceChildren(line) : element.append(line);
};
const menu = "This frontend lets no button run cells; choose Run ▸ Run Selected Cell and All Below with the cell below selected.";
const press = (node, kinds) => {
  const box = node.getBoundingClientRect();
  const at = {bubbles: true, cancelable: true, view: window, button: 0, clientX: box.x + 3, clientY: box.y + 3};
  for (const kind of kinds) node.dispatchEvent(new (kind.startsWith('p') ? PointerEvent : MouseEvent)(kind, at));
};
const later = time => new Promise(done => setTimeout(done, time));
(async () => {
  const cell = shown && shown.closest('.jp-Cell');
  if (!cell) {
    const classic = window.Jupyter && window.Jupyter.notebook;
    if (!classic) return say(menu);
    const own = shown && classic.get_cells().findIndex(one => one.element[0].contains(shown));
    classic.select(own + 1);
    classic.execute_cells_below();
    return say('Running the cells below.');
  }
  let next = cell.nextElementSibling;
  while (next && !next.classList.contains('jp-Cell')) next = next.nextElementSibling;
  const run = [...document.querySelectorAll('.lm-MenuBar-item')].find(one => one.textContent.trim() === 'Run');
  if (!next || !run) return say(menu);
  press(next.querySelector('.jp-InputPrompt') || next, ['mousedown', 'mouseup', 'click']);
  await later(100);
  press(run, ['pointerdown', 'mousedown']);  // newer menus listen to the first, older to the second
  for (let tries = 0; tries < 20; tries++) {
    await later(50);
    const item = document.querySelector('.lm-Menu-item[data-command="notebook:run-all-below"], .lm-Menu-item[data-command="runmenu:run-below"]');
    if (!item) continue;
    press(item, ['pointermove', 'mousemove', 'pointerup', 'mouseup']);
    return say('Running the cells below.');
  }
  document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', keyCode: 27, bubbles: true}));
  say(menu);
})();
