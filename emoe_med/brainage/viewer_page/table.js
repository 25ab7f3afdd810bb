// The table of parcels: of the chosen expert, or of the whole layer. A name leads to the parcel's peak in the map;
// the parcel under the crosshair is marked.

const COLUMNS = {
  expert: [
    { key: "name", label: "Parcel", text: true },
    { key: "occupancy", label: "Occupancy", digits: 2, title: "share of heads in which the expert serves, with its 95 % interval over persons" },
    { key: "enrichment", label: "Enriched", digits: 1, before: "×", title: "occupancy here over that in the whole brain; 1 is as everywhere" },
    { key: "q", label: "q", digits: 3, title: "false discovery rate: of the findings up to this one, the share to be expected where there is nothing (turned patches, a router that draws lots)" },
    { key: "share_of_mass", label: "Of its work", digits: 1, percent: true, title: "share of all that the expert serves" },
    { key: "contribution", label: "Years", digits: 3, title: "contribution to the predicted age, years, with its 95 % interval" },
    { key: "laterality", label: "L−R", digits: 2, title: "(left - right) / (left + right)" },
    { key: "slope_per_decade", label: "Per decade", digits: 3, title: "change of occupancy per decade of age, with its 95 % interval" },
    { key: "slope_q", label: "age q", digits: 3, title: "of the change with age, corrected" },
    { key: "covered", label: "Covered", digits: 0, percent: true, title: "share of the parcel that lies in routed cells" },
  ],
  whole: [
    { key: "name", label: "Parcel", text: true },
    { key: "top_expert", label: "Top", expert: true, title: "expert that serves the parcel most, and its occupancy" },
    { key: "top_occupancy", label: "its share", digits: 2 },
    { key: "entropy", label: "Entropy", digits: 2, title: "0: one expert serves it; 1: all share it evenly" },
    { key: "contribution", label: "Years", digits: 3, title: "years by which the layer's contribution differs between heads, with its 95 % interval" },
    { key: "contribution_q", label: "q", digits: 3, title: "false discovery rate: of the findings up to this one, the share to be expected when parcels are turned about" },
    { key: "occlusion", label: "Occlusion", digits: 3, title: "the same when the parcel's cells are painted grey, years" },
    { key: "covered", label: "Covered", digits: 0, percent: true, title: "share of the parcel that lies in routed cells" },
  ],
};
const INTERVALS = { occupancy: "occupancy", contribution: "contribution", slope_per_decade: "slope" };
const order = { expert: { key: "occupancy", down: true }, whole: { key: "contribution", down: true } };
let shownRows = new Map(); // number of a parcel -> its row on the page
let marked = 0; // number of the parcel under the crosshair; parcels count from 1, in the order of page.parcels

function tableKind() {
  return state.quantity.by_expert ? "expert" : "whole";
}

function fillTable() {
  const kind = tableKind();
  byId("parcels").hidden = !page.parcels.length;
  byId("table-title").textContent = kind === "expert" ? `Parcels, expert ${state.expert}` : "Parcels, all experts";
  byId("remark").textContent = kind === "expert" ? page.experts.find((e) => e.name === state.expert).remark : "";
  const numbers = new Map(page.parcels.map((row, index) => [row.parcel, index + 1]));
  const source = kind === "expert" ? page.regions.filter((row) => row.expert === state.expert) : page.parcels;
  const wanted = byId("find").value.toLowerCase();
  const rows = source.filter((row) => row.name.toLowerCase().includes(wanted)).sort(byColumn(order[kind]));
  const table = byId("parcels").querySelector("table");
  table.tHead.replaceChildren(headRow(kind));
  shownRows = new Map();
  table.tBodies[0].replaceChildren(...rows.map((row) => {
    const line = bodyRow(row, kind, numbers.get(row.parcel));
    shownRows.set(numbers.get(row.parcel), line);
    return line;
  }));
  markParcel(marked, true);
}

// Rows without a value come last, whichever way it is sorted.
function byColumn({ key, down }) {
  const sign = down ? -1 : 1;
  return (a, b) => {
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null);
    return sign * (typeof a[key] === "string" ? a[key].localeCompare(b[key]) : a[key] - b[key]);
  };
}

function headRow(kind) {
  const line = document.createElement("tr");
  for (const column of COLUMNS[kind]) {
    const cell = document.createElement("th");
    const sorted = order[kind].key === column.key;
    cell.setAttribute("aria-sort", sorted ? (order[kind].down ? "descending" : "ascending") : "none");
    const button = document.createElement("button");
    button.textContent = column.label + (sorted ? (order[kind].down ? " ▼" : " ▲") : "");
    button.title = column.title || "";
    button.addEventListener("click", () => {
      order[kind] = { key: column.key, down: sorted ? !order[kind].down : !column.text };
      fillTable();
      byId("parcels").querySelectorAll("th button")[COLUMNS[kind].indexOf(column)].focus();
    });
    cell.append(button);
    line.append(cell);
  }
  return line;
}

function bodyRow(row, kind, number) {
  const line = document.createElement("tr");
  for (const column of COLUMNS[kind]) {
    const cell = line.insertCell();
    const value = row[column.key];
    if (column.text) {
      const button = document.createElement("button");
      button.textContent = value;
      button.addEventListener("click", () => goToParcel(number));
      cell.append(button);
    } else if (column.expert && value) {
      const swatch = document.createElement("i");
      swatch.style.background = page.experts.find((expert) => expert.name === value).colour;
      cell.append(swatch, ` ${value}`);
    } else {
      cell.textContent = figure(value, column);
      const ends = INTERVALS[column.key];
      if (ends && row[`${ends}_low`] != null) {
        const span = document.createElement("small");
        span.textContent = `${figure(row[`${ends}_low`], column)} to ${figure(row[`${ends}_high`], column)}`;
        cell.append(span);
      }
    }
  }
  return line;
}

function figure(value, column) {
  if (value === null || value === undefined) return "–";
  if (column.key.endsWith("q") && value < 0.001) return "< 0.001";
  return (column.before || "") + show(column.percent ? 100 * value : value, column.digits) + (column.percent ? " %" : "");
}

function markParcel(number, again = false) {
  if (number === marked && !again) return;
  shownRows.get(marked)?.classList.remove("here");
  marked = number;
  const line = shownRows.get(number);
  byId("parcel").textContent = number > 0 ? page.parcels[number - 1].name : "outside of every parcel";
  if (!line) return;
  line.classList.add("here");
  const pane = line.closest(".scroll");
  if (pane.contains(document.activeElement)) return; // a person is at work in the table
  const [top, height] = [line.offsetTop, line.offsetHeight];
  if (top < pane.scrollTop + 60 || top + height > pane.scrollTop + pane.clientHeight) {
    pane.scrollTop = top - pane.clientHeight / 3;
  }
}

// Go to where the shown map is strongest within the parcel; among equals, and in a map of labels, to its middle.
async function goToParcel(number) {
  const [parcels, map] = await Promise.all([volume("parcels"), volume(mapName())]);
  const [width, height, depth] = parcels.shape;
  let best = -1, places = [];
  for (let i = 0; i < width; i++) for (let j = 0; j < height; j++) for (let k = 0; k < depth; k++) {
    if (parcels.data[(i * height + j) * depth + k] !== number) continue;
    const place = parcels.place(i, j, k);
    const value = map && state.quantity.kind !== "labels" ? Math.abs(map.at(place)) || 0 : 0;
    if (value > best) { best = value; places = []; }
    if (value === best) places.push(place);
  }
  if (!places.length) return;
  const middle = [0, 1, 2].map((axis) => places.reduce((sum, place) => sum + place[axis], 0) / places.length);
  const far = (place) => Math.hypot(...place.map((value, axis) => value - middle[axis]));
  moveTo(places.reduce((nearest, place) => (far(place) < far(nearest) ? place : nearest)));
}
