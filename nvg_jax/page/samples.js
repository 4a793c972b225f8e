const range = () => element.querySelector("input");
const show = () => {
  if (!range()) return;
  for (const part of element.querySelectorAll("[data-stage]"))
    part.hidden = part.dataset.stage !== range().value;
  for (const button of element.querySelectorAll("[data-go]"))
    button.setAttribute("aria-pressed", button.dataset.go === range().value);
};
element.addEventListener("input", show);
element.addEventListener("click", event => {
  const button = event.target.closest("[data-go]");
  if (button) { range().value = button.dataset.go; show(); }
});
watch("value", () => {  // new samples, at the stage that was chosen
  show();
  element.scrollIntoView({block: "nearest", behavior: "smooth"});
});
