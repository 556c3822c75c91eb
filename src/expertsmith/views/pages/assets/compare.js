// Draws quality over size, and follows the selector, the theme and the width.
const names = Object.keys(M.measures), select = document.getElementById("measure"), plot = "plot-size";
for (const name of names) select.add(new Option(M.measures[name], name));
const colourOf = (held) => held.random ? quiet().color : colour(held.colour);

function traces(measure) {
  const made = [];
  for (const held of M.lines) {
    const x = [...held.points.map((p) => 100 * p.share), 100], y = [...held.points.map((p) => p.values[measure]), 0];
    if (held.random) {
      const edge = (pick) => [...held.points.map((p) => pick(...p.draws.map((d) => d[measure]))), 0], common = { x, type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: held.name, line: { width: 0 } };
      made.push({ ...common, y: edge(Math.min) }, { ...common, y: edge(Math.max), fill: "tonexty", fillcolor: quiet().color + "30" });
    }
    const own = colourOf(held);
    const error_y = { type: "data", array: [...held.points.map((p) => p.error ?? 0), 0], visible: measure === "mean" && !held.random, thickness: 1, width: 4, color: own };
    const text = [...held.points.map((p) => `${p.group}: ${p.experts[1]} of ${p.experts[0]} experts<br>mean rise ${p.values.mean.toFixed(3)}${p.error == null ? "" : " ± " + p.error.toFixed(3)}, KL ${p.values.kl.toFixed(3)}<br>top-1 ${(100 - p.values.lost).toFixed(1)} %, planned in ${p.seconds.toFixed(2)} s`), "the original"];
    made.push({ type: "scatter", mode: "lines+markers", name: held.name, legendgroup: held.name, error_y, x, y, text, line: { color: own, width: 2, dash: held.random ? "dash" : DASHES[held.dash] }, marker: { color: own, size: [...held.points.map(() => 8), 0], symbol: held.marker ?? "circle" }, hovertemplate: "%{y:.3f} at %{x:.0f} % of the bytes<br>%{text}<extra>%{fullData.name}</extra>" });
  }
  return made;
}
function draw() {
  const narrow = printing || innerWidth < 830, measure = select.value;
  Plotly.react(plot, traces(measure), layout({ ...(printing ? { height: LOW } : {}), hovermode: "closest", margin: { l: 52, r: 14, t: 10, b: 46 }, xaxis: { title: "bytes, % of the original" }, yaxis: { title: M.measures[measure] }, legend: narrow ? { orientation: "h", y: -0.16, font: { size: 11 } } : { orientation: "v", x: 1.01, y: 1, font: { size: 12 } } }), { displayModeBar: false, responsive: true });
}
function save(blob, name) {
  const link = document.createElement("a");
  link.href = typeof blob === "string" ? blob : URL.createObjectURL(blob);
  link.download = name;
  link.click();
}
const quoted = (text) => '"' + String(text).replaceAll('"', '""') + '"';
function csv() {
  const rows = [["method", "share of bytes", "experts", ...names].map(quoted).join(",")];
  for (const held of M.lines) for (const p of held.points) rows.push([quoted(held.name), p.share, p.experts[1], ...names.map((name) => p.values[name])].join(","));
  save(new Blob([rows.join("\n") + "\n"], { type: "text/csv" }), "comparison.csv");
}
for (const kind of ["svg", "png", "csv"]) {
  const button = document.createElement("button");
  button.type = "button"; button.textContent = kind.toUpperCase(); button.title = `Save as ${kind.toUpperCase()}`;
  button.addEventListener("click", () => kind === "csv" ? csv() : Plotly.toImage(plot, { format: kind, scale: kind === "png" ? 2 : 1, width: 1000, height: 560 }).then((url) => save(url, `comparison.${kind}`)));
  document.querySelector("#figure-size .tools").append(button);
}
function theme(isDark) { root.classList.toggle("dark", isDark); draw(); }
const preferred = matchMedia("(prefers-color-scheme: dark)");
theme(preferred.matches);
preferred.addEventListener("change", (event) => theme(event.matches));
document.getElementById("theme").addEventListener("click", () => theme(!dark()));
select.addEventListener("change", draw);
addEventListener("resize", draw);
onPaper(draw);
