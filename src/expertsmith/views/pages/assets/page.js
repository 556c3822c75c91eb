// Puts the figures on the page, draws them when they scroll into view or are printed, and updates them for selectors and theme.
const esc = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const present = FIGURES.filter((figure) => figure.when());
const CHOICES = {
  layer: { label: "Layer", values: LAYERS.map((l, i) => [i, String(l)]), steps: true },
  domain: { label: "Domain", values: DOMAINS.length > 1 ? [["all", "all"], ...DOMAINS.map((d) => [d, d])] : [["all", "all"]] },
  keep: { label: "Keep", values: (B ? B.ratios : []).map((r) => [r, 100 * r + " %"]) },
  shown: { label: "show", values: Object.entries(USES), local: true },
  matrix: { label: "of", values: Object.keys(MATRICES).map((name) => [name, name]), local: true },
  role: { label: "projection", values: roles.map((role) => [role, role]), local: true },
  part: { label: "of", values: Object.entries(PARTS), local: true },
};
const state = {}, local = {}, drawn = new Set(), last = {};
for (const [name, choice] of Object.entries(CHOICES)) if (choice.values.length) state[name] = choice.values[0][0];
if (state.layer !== undefined) state.layer = Math.floor((LAYERS.length - 1) / 2);
if (B && B.ratios.includes(0.5)) state.keep = 0.5;

function chooser(name, figure) {
  const choice = CHOICES[name], box = document.createElement("label"), select = document.createElement("select");
  box.append(choice.label + " ", select);
  select.dataset.choice = name;
  for (const [i, [, text]] of choice.values.entries()) select.add(new Option(text, i));
  const values = choice.values.map(([value]) => value);
  select.selectedIndex = values.indexOf(state[name]);
  select.addEventListener("change", () => change(name, values[select.selectedIndex], figure));
  if (choice.steps && values.length > 1) for (const [text, step] of [["‹", -1], ["›", 1]]) {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = text; button.setAttribute("aria-label", step < 0 ? "previous" : "next");
    button.addEventListener("click", () => { const at = Math.min(values.length - 1, Math.max(0, select.selectedIndex + step)); select.selectedIndex = at; change(name, values[at], figure); });
    step < 0 ? select.before(button) : box.append(button);
  }
  return box;
}
function change(name, value, figure) {
  if (figure) { (local[figure.id] ??= {})[name] = value; draw(figure); return; }
  state[name] = value;
  for (const other of present) if (other.uses.includes(name) && drawn.has(other.id)) draw(other);
}
function draw(figure) {
  const target = document.getElementById("plot-" + figure.id);
  const made = figure.draw({ ...state, ...(local[figure.id] || {}) });
  last[figure.id] = made;
  drawn.add(figure.id);
  if (figure.html) { target.innerHTML = made.html; return; }
  const scale = made.traces.find((trace) => trace.meta)?.meta;
  target.nextElementSibling.textContent = scale ? stated(scale) : "";
  Plotly.react(target, made.traces, layout(made.layout), { displayModeBar: false, responsive: true });
}
function save(blob, name) {
  const link = document.createElement("a");
  link.href = typeof blob === "string" ? blob : URL.createObjectURL(blob);
  link.download = name;
  link.click();
}
function exportAs(figure, kind) {
  const name = figure.id + (figure.uses.includes("layer") ? "-layer" + LAYERS[state.layer] : "");
  if (kind === "csv") {
    const cell = (v) => (v == null ? "" : /[",\n]/.test(v) ? '"' + String(v).replaceAll('"', '""') + '"' : v), csv = last[figure.id].csv;
    save(new Blob([[csv.columns, ...csv.rows].map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" }), name + ".csv");
    return;
  }
  Plotly.toImage("plot-" + figure.id, { format: kind, scale: kind === "png" ? 2 : 1, width: 900, height: 520 }).then((url) => save(url, `${name}.${kind}`));
}
function card(figure) {
  const box = document.createElement("article");
  box.className = "card" + (figure.full ? " full" : "");
  box.id = "figure-" + figure.id;
  box.innerHTML = `<div class="head"><h3>${esc(figure.title)}</h3><div class="tools"></div></div><p>${esc(figure.read)}</p><div class="choices"></div><div class="plot" id="plot-${figure.id}"></div><p class="scale"></p>`;
  for (const kind of figure.html ? ["csv"] : ["svg", "png", "csv"]) {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = kind.toUpperCase(); button.title = `Save as ${kind.toUpperCase()}`;
    button.addEventListener("click", () => { if (!drawn.has(figure.id)) draw(figure); exportAs(figure, kind); });
    box.querySelector(".tools").append(button);
  }
  for (const name of figure.uses) if (CHOICES[name].local && CHOICES[name].values.length > 1) box.querySelector(".choices").append(chooser(name, figure));
  return box;
}
function theme(isDark) { root.classList.toggle("dark", isDark); for (const figure of present) if (drawn.has(figure.id)) draw(figure); }

const preferred = matchMedia("(prefers-color-scheme: dark)");
theme(preferred.matches);
preferred.addEventListener("change", (event) => theme(event.matches));
document.getElementById("theme").addEventListener("click", () => theme(!dark()));
const bar = document.getElementById("bar");
for (const name of ["layer", "domain", "keep"]) if ((CHOICES[name].values.length > 1) && present.some((figure) => figure.uses.includes(name))) bar.append(chooser(name));
if (!bar.children.length) bar.remove();
const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { sight.unobserve(entry.target); draw(present.find((figure) => "figure-" + figure.id === entry.target.id)); }
}, { rootMargin: "600px" });
// the first screen has the figure that says most: what was removed, or what the experts are used for
const opening = present.find((figure) => figure.id === "dropped") ?? present[0];
if (opening) { const box = card(opening); document.getElementById("opening").append(box); sight.observe(box); }
for (const [key, [title, text]] of Object.entries(SECTIONS)) {
  const held = present.filter((figure) => figure.section === key && figure !== opening);
  if (!held.length) continue;
  const section = document.createElement("section");
  section.id = "section-" + key;
  section.dataset.title = title;
  section.innerHTML = `<h2>${esc(title)}</h2><p class="soft">${esc(text)}</p><div class="cards"></div>`;
  const halves = held.filter((figure) => !figure.full);
  if (halves.length % 2) halves.at(-1).full = true; // no hole in the grid
  for (const figure of held) { const box = card(figure); section.lastChild.append(box); sight.observe(box); }
  document.getElementById("main").append(section);
}
for (const section of document.querySelectorAll("section[data-title]")) {
  const entry = document.createElement("li"), link = document.createElement("a");
  link.href = "#" + section.id; link.textContent = section.dataset.title;
  entry.append(link); document.getElementById("contents").append(entry);
}
onPaper(() => { for (const figure of present) if (printing || drawn.has(figure.id)) draw(figure); });
