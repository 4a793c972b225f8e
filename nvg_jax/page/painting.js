// The value is {"picture": data URL or nothing, "painted": the same}, at the model's resolution.
const canvas = element.querySelector("canvas"), board = canvas.parentNode;
const context = canvas.getContext("2d"), cursor = element.querySelector(".cursor");
const colors = [...element.querySelectorAll("[data-color]")];
const brush = Math.max(1, Math.round(canvas.width / 8));
let color, at = [canvas.width / 2, canvas.height / 2], own;
const choose = button => {
  color = button.dataset.color;
  colors.forEach(other => other.setAttribute("aria-pressed", other === button));
};
const paint = (x, y) => {
  const corner = [Math.round(x - brush / 2), Math.round(y - brush / 2), brush, brush];
  context.clearRect(...corner);
  context.fillStyle = color;
  if (color) context.fillRect(...corner);
};
const move = (x, y, painting) => {
  const from = at, steps = Math.max(1, Math.ceil(Math.hypot(x - at[0], y - at[1])));
  at = [Math.min(Math.max(x, 0), canvas.width), Math.min(Math.max(y, 0), canvas.height)];
  cursor.style.left = 100 * at[0] / canvas.width + "%";
  cursor.style.top = 100 * at[1] / canvas.height + "%";
  for (let i = 0; painting && i <= steps; i++)
    paint(from[0] + (at[0] - from[0]) * i / steps, from[1] + (at[1] - from[1]) * i / steps);
};
const place = event => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * canvas.width,
          (event.clientY - box.top) / box.height * canvas.height];
};
const save = () => { own = canvas.toDataURL(); props.value = {...props.value, painted: own}; };
const load = () => {  // what Python sent
  const value = props.value || {};
  if (own && value.painted === own) return;
  board.style.backgroundImage = value.picture ? `url(${value.picture})` : "";
  context.clearRect(0, 0, canvas.width, canvas.height);
  const image = new Image();
  image.onload = () => context.drawImage(image, 0, 0);
  if (value.painted) image.src = value.painted;
};
if (colors.length) {
  choose(colors[0]);
  cursor.style.width = 100 * brush / canvas.width + "%";
  cursor.style.height = 100 * brush / canvas.height + "%";
  move(...at);
  canvas.onpointerdown = event => {
    if (event.button || !event.isPrimary) return;  // a right click, another finger
    canvas.setPointerCapture(event.pointerId);
    at = place(event);
    move(...at, true);
  };
  canvas.onpointermove = event =>
    event.isPrimary && move(...place(event), canvas.hasPointerCapture(event.pointerId));
  canvas.onlostpointercapture = save;  // also of a stroke that ends outside
  canvas.onkeydown = event => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;  // the browser's
    const by = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const [x, y] = by[event.key] || [];
    if (by[event.key]) move(at[0] + x * brush / 2, at[1] + y * brush / 2, event.shiftKey);
    else if (event.key === " ") paint(...at);
    else return;
    event.preventDefault();
    save();
  };
  element.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (button && colors.includes(button)) choose(button);
    else if (button) { context.clearRect(0, 0, canvas.width, canvas.height); save(); }
  });
}
watch("value", load);
load();
