"use strict";
// Colours of the two themes, and what all figures share.
const M = JSON.parse(document.getElementById("measures").textContent);
const root = document.documentElement;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const dark = () => root.classList.contains("dark");
const SERIES = { light: ["#3457c9", "#d9731a", "#2b8a5c", "#a04bc4", "#c2384a", "#6f7b8f", "#0e8a9c", "#9c7a10"], dark: ["#8fb0ff", "#ffab66", "#6fd6a4", "#d59bf5", "#ff8c98", "#a7b2c4", "#5cd0df", "#e0c05a"] };
const series = (i) => { const held = SERIES[dark() ? "dark" : "light"]; return held[i % held.length]; };
const sequential = () => dark() ? [[0, "#181e2a"], [0.35, "#27457f"], [0.7, "#5b8df5"], [1, "#dbe7ff"]] : [[0, "#f7f9fd"], [0.35, "#b9cbf3"], [0.7, "#4f76d9"], [1, "#16296b"]];
const diverging = () => dark() ? [[0, "#ff9c4a"], [0.5, "#202838"], [1, "#7fa6ff"]] : [[0, "#c8640f"], [0.5, "#f6f7f9"], [1, "#2546ad"]];
// diverging around 1 (times chance) on a scale from 0 to `top`
const around = (top) => diverging().map(([at, colour]) => [at <= 0.5 ? (2 * at) / top : 1 / top + (2 * at - 1) * (1 - 1 / top), colour]);
const losing = () => dark() ? [[0, "#181e2a"], [0.5, "#8a3b46"], [1, "#ff9aa2"]] : [[0, "#fdf7f7"], [0.5, "#e69aa1"], [1, "#8f1f2d"]];

// On paper a page shows every figure, in light colours and as wide as the paper is; afterwards it is what it was. Browsers that have no
// "beforeprint" say it through the medium.
const PAPER = 660; // pixels: A4 and Letter, without their margins and a card's
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
  for (const name of ["xaxis", "yaxis"]) {
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

function heat(z, x, y, more) {
  return { type: "heatmap", z, x, y, hoverongaps: false, xgap: z.length * (z[0] || []).length > 1600 ? 0 : 1, ygap: z.length > 40 ? 0 : 1, colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: css("--soft"), size: 10 } }, ...more };
}
const bars = (name, x, y, i, more) => ({ type: "bar", name, x, y, marker: { color: series(i) }, ...more });
const line = (name, x, y, i, more) => ({ type: "scatter", mode: "lines+markers", name, x, y, line: { color: series(i), width: 2 }, marker: { size: 6, color: series(i) }, ...more });
