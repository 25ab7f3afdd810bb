// State, controls, and what follows from them. Everything shown is drawn anew from `state` by `draw`.

const page = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const volumes = new Map(); // name -> promise of a Volume; a map is unpacked when it is first looked at
const state = {
  quantity: page.quantities[0],
  layer: page.layers[0],
  expert: page.experts[0].name,
  threshold: 0,
  opacity: 0.75,
  smooth: false,
  at: page.start,
};
let drawn = 0; // counts draws: one that was overtaken stops

function volume(name) {
  if (!volumes.has(name)) volumes.set(name, page.volumes[name] ? Volume.load(page.volumes[name]) : null);
  return volumes.get(name);
}

function mapName(expert = state.expert) {
  return [state.layer, state.quantity.name, ...(state.quantity.by_expert ? [expert] : [])].join("/");
}

// --- controls ---

function fillControls() {
  for (const quantity of page.quantities) byId("quantity").add(new Option(quantity.label, quantity.name));
  for (const layer of page.layers) byId("layer").add(new Option(layer));
  byId("experts").append(...page.experts.map((expert, index) => {
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "expert", value: expert.name });
    radio.checked = index === 0;
    radio.addEventListener("change", () => { state.expert = expert.name; fillTable(); draw(); });
    const swatch = document.createElement("i");
    swatch.style.background = expert.colour;
    label.append(radio, swatch, expert.name);
    label.title = expert.remark;
    return label;
  }));
  byId("quantity").addEventListener("change", (event) => chooseQuantity(event.target.value));
  byId("layer").addEventListener("change", (event) => { state.layer = event.target.value; chooseQuantity(state.quantity.name); });
  byId("threshold").addEventListener("input", (event) => { state.threshold = event.target.value * limit() / 100; draw(); });
  byId("opacity").addEventListener("input", (event) => { state.opacity = event.target.value / 100; draw(); });
  byId("smooth").addEventListener("change", (event) => { state.smooth = event.target.checked; draw(); });
  byId("find").addEventListener("input", fillTable);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const [axis, id] of ["x", "y", "z"].entries()) {
    const input = byId(id);
    [input.min, input.max] = page.box[axis];
    input.addEventListener("change", () => moveTo(state.at.map((v, n) => (n === axis ? Number(input.value) : v))));
  }
}

function limit() {
  return state.quantity.limit[state.layer] || 1;
}

function chooseQuantity(name) {
  state.quantity = page.quantities.find((quantity) => quantity.name === name);
  state.threshold = Math.min(state.quantity.threshold, limit());
  byId("threshold").value = (100 * state.threshold) / limit();
  byId("threshold").disabled = state.quantity.kind === "labels";
  byId("smooth").disabled = state.quantity.kind === "labels";
  byId("experts").disabled = !state.quantity.by_expert;
  byId("experts").classList.toggle("legend", state.quantity.kind === "labels");
  byId("note").textContent = state.quantity.note;
  fillTable();
  draw();
}

function show(value, digits = state.quantity.digits) {
  if (!Number.isFinite(value)) return "–";
  const small = value !== 0 && Math.abs(value) < 10 ** -digits; // two figures of it rather than 0.000
  return (small ? String(Number(value.toPrecision(2))) : value.toFixed(digits)).replace("-", "−");
}

// --- the place ---

function moveTo(place) {
  state.at = place.map((value, axis) => Math.max(page.box[axis][0], Math.min(page.box[axis][1], value)));
  draw();
}

function listenToSlice(slice) {
  const { canvas, plane } = slice;
  const pointed = (event) => {
    const frame = canvas.getBoundingClientRect();
    const column = ((event.clientX - frame.left) / frame.width) * canvas.width;
    const row = ((event.clientY - frame.top) / frame.height) * canvas.height;
    moveTo(slice.place(column, row, state.at).map((value) => Math.round(value)));
  };
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); pointed(event); });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) pointed(event); });
  canvas.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: [plane.across, -1], ArrowRight: [plane.across, 1], ArrowDown: [plane.up, -1],
      ArrowUp: [plane.up, 1], PageDown: [plane.through, -1], PageUp: [plane.through, 1],
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    const [axis, sign] = moves[event.key];
    const length = event.shiftKey ? page.cell_mm : page.step_mm;
    moveTo(state.at.map((value, n) => (n === axis ? value + sign * length : value)));
  });
}

function listenToHead(head) {
  const turn = (about, upwards) => {
    head.turn += about;
    head.tilt = Math.max(-1.5, Math.min(1.5, head.tilt + upwards));
    draw();
  };
  head.canvas.addEventListener("pointerdown", (event) => head.canvas.setPointerCapture(event.pointerId));
  head.canvas.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) turn(event.movementX / 90, event.movementY / 90);
  });
  head.canvas.addEventListener("keydown", (event) => {
    const turns = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] };
    if (!turns[event.key]) return;
    event.preventDefault();
    turn(...turns[event.key]);
  });
}

// --- drawing ---

async function draw() {
  const turn = ++drawn;
  await new Promise(requestAnimationFrame);
  const [anatomy, parcels, map] = await Promise.all([volume("anatomy"), volume("parcels"), volume(mapName())]);
  if (turn !== drawn) return;
  const colour = colouring(state.quantity, limit(), state.threshold, page.palette);
  const labels = state.quantity.kind === "labels";
  const view = {
    at: state.at, anatomy, map, colour, labels, opacity: state.opacity, warning: page.warning,
    smooth: state.smooth && !labels, threshold: labels ? 1 : state.threshold,
    key: [mapName(), state.threshold, state.opacity].join(" "),
  };
  for (const slice of slices) slice.draw(view);
  head.draw(view);
  drawScale();
  await tellPlace(map, parcels);
  if (turn === drawn) document.body.dataset.drawn = drawn; // for whoever waits for the picture
}

function drawScale() {
  const { kind, unit } = state.quantity;
  const bar = byId("bar");
  byId("scale").hidden = kind === "labels";
  const context = bar.getContext("2d");
  const [low, high] = kind === "diverging" ? [-limit(), limit()] : [0, limit()];
  const colour = colouring(state.quantity, limit(), state.threshold, page.palette);
  for (let column = 0; column < bar.width; column++) {
    const found = kind === "labels" ? null : colour(low + ((high - low) * (column + 0.5)) / bar.width);
    context.fillStyle = found ? `rgb(${found.join(" ")})` : "#e3e8ed";
    context.fillRect(column, 0, 1, bar.height);
  }
  byId("low").textContent = show(low);
  byId("high").textContent = `${show(high)} ${unit}`;
  byId("threshold-value").textContent = kind === "labels" ? "" : `${show(state.threshold)} ${unit}`;
  byId("opacity-value").textContent = `${Math.round(state.opacity * 100)} %`;
}

// Coordinates, parcel, and what every expert has at the crosshair.
async function tellPlace(map, parcels) {
  for (const [axis, id] of ["x", "y", "z"].entries()) byId(id).value = Math.round(state.at[axis] * 10) / 10;
  const sides = [["left", "right"], ["back", "front"], ["down", "up"]];
  byId("where").textContent = state.at
    .map((value, axis) => `${Math.abs(Math.round(value * 10) / 10)} mm ${sides[axis][value < 0 ? 0 : 1]}`).join(", ");
  const parcel = parcels ? parcels.at(state.at) : NaN;
  markParcel(parcel);
  const value = map ? map.at(state.at) : NaN;
  const { kind, unit, label } = state.quantity;
  byId("value").textContent = kind === "labels"
    ? `${label}: ${value > 0 ? page.experts[value - 1].name : "none is clear"}`
    : `${label}: ${show(value)} ${unit}`;
  byId("value").dataset.value = value;
  if (!state.quantity.by_expert) return byId("bars").replaceChildren();
  const maps = await Promise.all(page.experts.map((expert) => volume(mapName(expert.name))));
  byId("bars").replaceChildren(...page.experts.map((expert, index) => {
    const found = maps[index] ? maps[index].at(state.at) : NaN;
    const row = document.createElement("div");
    const track = document.createElement("b");
    const bar = document.createElement("i");
    bar.style.width = `${100 * Math.min(1, Math.abs(found || 0) / limit())}%`;
    bar.style.background = expert.colour;
    track.append(bar);
    row.append(expert.name, track, show(found));
    return row;
  }));
}

// what failed is read at once where there is room beside the slices
document.querySelector("details").open = innerWidth >= 1100 && document.querySelector("details .no") !== null;
const slices = Object.entries(PLANES).map(([id, plane]) => new Slice(byId(id), plane, page.box));
const head = new Head(byId("head"), page.box);
fillControls();
slices.forEach(listenToSlice);
listenToHead(head);
chooseQuantity(page.quantities[0].name);
