"use strict";
// Colours of the two themes, and what all figures share.
const M = JSON.parse(document.getElementById("measures").textContent);
const root = document.documentElement;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const dark = () => root.classList.contains("dark");
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"]; // as pictures.DASHES
const HATCHES = ["", "/", "x", ".", "\\"]; // of bars, in place of dashes and markers
const colour = (i) => M.colours[dark() ? "dark" : "light"][i];
// how a name is drawn, everywhere on the page; `quiet` is what others are compared with: chance, random, before
const look = (kind, name) => { const held = M.looks[kind][name]; return { color: colour(held.colour), symbol: held.marker, dash: DASHES[held.dash], hatch: HATCHES[held.colour % HATCHES.length] }; };
const quiet = () => ({ color: css("--soft"), symbol: "circle-open", dash: "dot", hatch: "" });
const sequential = () => dark() ? [[0, "#181e2a"], [0.35, "#27457f"], [0.7, "#5b8df5"], [1, "#dbe7ff"]] : [[0, "#f7f9fd"], [0.35, "#b9cbf3"], [0.7, "#4f76d9"], [1, "#16296b"]];
const diverging = () => dark() ? [[0, "#ff9c4a"], [0.5, "#202838"], [1, "#7fa6ff"]] : [[0, "#c8640f"], [0.5, "#f6f7f9"], [1, "#2546ad"]];
// diverging around 1 (times chance) on a scale from 0 to `top`
const around = (top) => diverging().map(([at, colour]) => [at <= 0.5 ? (2 * at) / top : 1 / top + (2 * at - 1) * (1 - 1 / top), colour]);
const losing = () => dark() ? [[0, "#181e2a"], [0.5, "#8a3b46"], [1, "#ff9aa2"]] : [[0, "#fdf7f7"], [0.5, "#e69aa1"], [1, "#8f1f2d"]];

// On paper a page shows every figure, in light colours and as wide as the paper is; afterwards it is what it was. Browsers that have no
// "beforeprint" say it through the medium.
const PAPER = 660; // pixels: A4 and Letter, without their margins and a card's
const LOW = 330; // so that two figures fit on a sheet
let printing = false;
function onPaper(redraw) {
  let before = false;
  const turn = (on) => {
    if (on === printing) return;
    if (on) before = dark();
    printing = on;
    root.classList.toggle("dark", on ? false : before);
    redraw();
  };
  addEventListener("beforeprint", () => turn(true));
  addEventListener("afterprint", () => turn(false));
  matchMedia("print").addEventListener("change", (event) => turn(event.matches));
}

function layout(more) {
  const grid = css("--line"), soft = css("--soft");
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickfont: { color: soft, size: 11 }, title: { font: { color: soft, size: 12 } }, automargin: true };
  const made = { paper_bgcolor: css("--card"), plot_bgcolor: css("--card"), font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 }, margin: { l: 46, r: 12, t: 8, b: 42 }, hoverlabel: { font: { size: 12 } }, legend: { orientation: "h", y: -0.22, font: { size: 11 } }, ...(printing ? { autosize: false, width: PAPER } : { autosize: true }), ...more };
  if (printing && made.height <= 520) made.height = Math.min(made.height, made.yaxis2 ? 420 : LOW); // taller ones grow with the layers
  for (const name of ["xaxis", "yaxis", ...(made.yaxis2 ? ["yaxis2"] : [])]) {
    const own = made[name] || {};
    const title = own.title === undefined ? axis.title : { text: own.title, font: axis.title.font, standoff: 6 };
    made[name] = { ...axis, ...own, title };
  }
  return made;
}

// a figure's numbers as CSV: columns and rows
const table = (columns, rows) => ({ columns, rows });
const range = (n) => Array.from({ length: n }, (_, i) => i);
// a logarithmic axis with ticks at 1, 2 and 5 of every decade
const logAxis = { type: "log", exponentformat: "none", tickvals: range(18).flatMap((k) => [1, 2, 5].map((d) => Number((d * 10 ** (k - 9)).toPrecision(1)))) };
const percent = (value) => (100 * value).toFixed(1) + " %";

// [n][n] from the lower triangle, row by row
function square(flat) {
  const n = Math.round((Math.sqrt(8 * flat.length + 1) - 1) / 2), full = range(n).map(() => new Array(n));
  let at = 0;
  for (let i = 0; i < n; i++) for (let j = 0; j <= i; j++) full[i][j] = full[j][i] = flat[at++];
  return full;
}

// order that puts similar items next to each other: average-linkage clustering of the distance 1 - similarity
function clustered(full) {
  const n = full.length;
  let groups = range(n).map((i) => [i]);
  const far = (a, b) => { let sum = 0; for (const i of a) for (const j of b) sum += 1 - (full[i][j] ?? -1); return sum / (a.length * b.length); };
  const distance = groups.map((a) => groups.map((b) => (a === b ? Infinity : far(a, b))));
  while (groups.length > 1) {
    let best = [0, 1];
    for (let i = 0; i < groups.length; i++) for (let j = i + 1; j < groups.length; j++) if (distance[i][j] < distance[best[0]][best[1]]) best = [i, j];
    const [i, j] = best, a = groups[i].length, b = groups[j].length;
    for (let k = 0; k < groups.length; k++) if (k !== i && k !== j) distance[i][k] = distance[k][i] = (a * distance[i][k] + b * distance[j][k]) / (a + b);
    groups[i] = groups[i].concat(groups[j]);
    groups.splice(j, 1); distance.splice(j, 1); distance.forEach((row) => row.splice(j, 1));
  }
  return groups[0] || [];
}

// A heat map states its scale in the colour bar and below the figure: { from, to, unit, means, colours }; `means` says what 0 (or the middle) is
function heat(z, x, y, scale, more) {
  const soft = css("--soft");
  return { type: "heatmap", z, x, y, zmin: scale.from, zmax: scale.to, colorscale: scale.colours, meta: scale, hoverongaps: false, xgap: z.length * (z[0] || []).length > 1600 ? 0 : 1, ygap: z.length > 40 ? 0 : 1, colorbar: { title: { text: scale.unit, side: "right", font: { color: soft, size: 11 } }, thickness: 10, outlinewidth: 0, tickfont: { color: soft, size: 10 }, ...(scale.share ? { tickformat: ".0%" } : {}), ...(scale.named ? { tickvals: range(scale.named.length), ticktext: scale.named } : {}) }, ...more };
}
const stated = ({ from, to, unit, means, share, named }) => { if (named) return ""; const said = (v) => (share ? Math.round(100 * v) + " %" : String(Number(v.toPrecision(3)))); return `Colours: ${said(from)} to ${said(to)} ${unit}. ${means}.`; };
const largest = (...parts) => parts.flat(Infinity).reduce((top, v) => (v != null && v > top ? v : top), 0);
const bars = (name, x, y, drawn, more) => ({ type: "bar", name, x, y, marker: { color: drawn.color, pattern: { shape: drawn.hatch, fillmode: "overlay", fgcolor: css("--card"), fgopacity: 0.5, size: 7, solidity: 0.2 } }, ...more });
const line = (name, x, y, drawn, more) => ({ type: "scatter", mode: "lines+markers", name, x, y, line: { color: drawn.color, width: 2, dash: drawn.dash }, marker: { size: 7, color: drawn.color, symbol: drawn.symbol }, ...more });
