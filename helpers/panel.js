// Sliders get the name of their parameter for screen readers: the widgets give their handles none.
const name = () => {
  for (const slider of document.querySelectorAll('.tunebook-panel .widget-hslider')) {
    const handle = slider.querySelector('.noUi-handle, .ui-slider-handle');
    const row = slider.closest('.tunebook-row');
    const label = row && row.querySelector('.widget-text label, .widget-text .widget-label');
    if (!handle || !label) continue;
    handle.setAttribute('aria-label', label.textContent.trim() + ', slider');
    const field = row.querySelector('input[type=text]');
    if (field) handle.setAttribute('aria-valuetext', field.value);
  }
};
name();
if (!window.tunebookNames) window.tunebookNames = setInterval(name, 1000);
