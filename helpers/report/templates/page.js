// Filters of the answers and a button that copies; the page is whole without it.
for (const button of document.querySelectorAll(".copy button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const pre = button.parentElement.querySelector("pre");
    const range = document.createRange(); range.selectNodeContents(pre);
    const chosen = getSelection(); chosen.removeAllRanges(); chosen.addRange(range);
    let done = false;
    try { await navigator.clipboard.writeText(pre.textContent); done = true; } catch { done = document.execCommand("copy"); }
    button.textContent = done ? "Copied" : "Selected";
  });
}
const unfold = () => { const part = location.hash.length > 1 && document.getElementById(location.hash.slice(1))?.querySelector("details"); if (part) part.open = true; };
addEventListener("hashchange", unfold); unfold();
(() => {
  const box = document.getElementById("answers");
  if (!box) return;
  const items = [...box.querySelectorAll(".item")], count = box.querySelector(".count"), more = box.querySelector(".show-more");
  const buttons = [...box.querySelectorAll("button[data-group]")], selects = [...box.querySelectorAll("select")], search = box.querySelector("input");
  const PAGE = 12;
  let group = "all", shown = PAGE;
  const apply = () => {
    const wanted = selects.filter(s => s.value).map(s => [s.name, s.value]);
    const text = search.value.trim().toLowerCase();
    let hits = 0;
    for (const item of items) {
      const fits = (group === "all" || item.dataset.group === group) && (!text || item.textContent.toLowerCase().includes(text)) &&
        wanted.every(([name, value]) => item.dataset[name].split("\n").includes(value));
      if (fits) hits++;
      item.hidden = !fits || hits > shown;
    }
    count.textContent = hits > shown ? `${shown} of ${hits}` : `${hits}`;
    more.hidden = hits <= shown;
  };
  const again = () => { shown = PAGE; apply(); };
  for (const b of buttons) b.addEventListener("click", () => { group = b.dataset.group; for (const o of buttons) o.setAttribute("aria-pressed", o === b); again(); });
  for (const s of selects) s.addEventListener("change", again);
  search.addEventListener("input", again);
  more.addEventListener("click", () => { shown += 4 * PAGE; apply(); });
  box.querySelector(".filters").hidden = false;
  apply();
})();
