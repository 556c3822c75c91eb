// Figures on the expected loss before pruning, and on the effect of pruning.
const B = M.before_cut, A = M.after_cut;
const column = (l) => B.layers.indexOf(l);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
// lost shares of one method and ratio by layer: of one domain, or the mean over domains
const lost = (what, m, r, domain) => (domain === "all" ? B.layers.map((_, i) => mean(B.domains.map((_, d) => B[what][m][r][d][i]))) : B[what][m][r][B.domains.indexOf(domain)]);
const cuttable = () => B && B.ratios.length > 0;

FIGURES.push({
  id: "saliency", section: "before", full: true, title: "Saliency and kept experts", uses: ["domain", "keep"], when: cuttable,
  read: "EASY-EP saliency as a share of its layer. Dots mark the experts kept at the chosen ratio for the chosen domain.",
  draw: (s) => {
    const r = B.ratios.indexOf(s.keep), kept = B.kept[s.domain === "all" ? "all" : "for " + s.domain][r];
    const z = L.map((e) => padded(used(e, s.domain).saliency.map((v) => v * e.num_experts))), x = [], y = [];
    kept.forEach((ids, i) => ids.forEach((e) => { x.push(e); y.push(String(B.layers[i])); }));
    const staying = (i, e) => (kept[column(LAYERS[i])].includes(e) ? 1 : 0);
    return { traces: [heat(z, experts, labels, { ...EVEN(largest(z)), means: "1 is an even share, 0 is no saliency" }, { hovertemplate: "layer %{y}, expert %{x}: %{z:.2f} × even share<extra></extra>" }), { type: "scatter", mode: "markers", x, y, name: "stays", hoverinfo: "skip", marker: { size: Math.max(4, Math.min(9, 300 / most)), color: look("series", "kept").color, line: { width: 1, color: css("--card") } } }], layout: { height: mapHeight(), showlegend: false, xaxis: { title: "expert", range: [-0.5, most - 0.5] }, yaxis: { title: "layer", autorange: "reversed", type: "category" } }, csv: table(["layer", "expert", "saliency", "stays"], z.flatMap((row, i) => row.map((v, e) => [LAYERS[i], e, v, v == null ? "" : staying(i, e)]))) };
  },
});
const PARTS = { energy: "output energy", mass: "routing mass" };
FIGURES.push({
  id: "lost", section: "before", title: "What each method would lose", uses: ["domain", "part"], when: cuttable,
  read: "Share of the dropped experts, mean over layers, with experts chosen for all domains. Lower is better; random is the baseline.",
  draw: (s) => {
    const rows = B.methods.map((_, m) => B.ratios.map((_, r) => mean(lost(s.part, m, r, s.domain)))), traces = B.methods.map((name, m) => line(name, B.ratios, rows[m], name === "random" ? quiet() : look("method", name)));
    if (s.domain !== "all") { const d = B.domains.indexOf(s.domain), m = B.methods.indexOf("easy_ep"); traces.push(line(`easy_ep chosen for ${s.domain}`, B.ratios, B.ratios.map((_, r) => mean(B[s.part + "_own"][m][r][d])), { ...look("method", "easy_ep"), dash: "longdash" })); }
    return { traces, layout: { height: 400, legend: { orientation: "h", y: -0.2, font: { size: 10 } }, xaxis: { title: "experts kept", autorange: "reversed", tickvals: B.ratios, tickformat: ".0%" }, yaxis: { title: "lost " + PARTS[s.part], tickformat: ".0%", rangemode: "tozero" } }, csv: table(["method", ...B.ratios], B.methods.map((name, m) => [name, ...rows[m]])) };
  },
});
FIGURES.push({
  id: "lostmap", section: "before", title: "Where it would be lost", uses: ["domain", "part"], when: cuttable,
  read: "EASY-EP by layer and ratio. Strong rows are layers that need their experts; faint rows can lose more of them.",
  draw: (s) => {
    const m = Math.max(0, B.methods.indexOf("easy_ep")), rows = B.ratios.map((_, r) => lost(s.part, m, r, s.domain)), z = B.layers.map((_, i) => rows.map((row) => row[i])), top = largest(0.01, B[s.part][m]);
    return { traces: [heat(z, B.ratios.map((r) => 100 * r + " %"), B.layers.map(String), { from: 0, to: top, unit: "of the " + PARTS[s.part], means: "0 % loses nothing; the scale is the same for all domains", share: true, colours: losing() }, { hovertemplate: "layer %{y}, keep %{x}: %{z:.1%} lost<extra></extra>" })], layout: { height: Math.max(400, mapHeight()), xaxis: { title: "experts kept", type: "category" }, yaxis: { title: "layer", type: "category", autorange: "reversed" } }, csv: table(["layer", ...B.ratios], z.map((row, i) => [B.layers[i], ...row])) };
  },
});
FIGURES.push({
  id: "budget", section: "before", title: "Suggested budget", uses: ["domain"], when: () => M.suggested_budget != null,
  read: "The fewest experts of each layer that lose at most 5 % of output energy (for all domains, or the chosen one). The pale part can be removed.",
  draw: (s) => {
    const found = s.domain === "all" || !M.suggested_budget.for_domain ? M.suggested_budget : M.suggested_budget.for_domain[s.domain], rows = found.by_layer, x = rows.map((r) => String(r.layer));
    return { traces: [bars("keep", x, rows.map((r) => r.keep), look("series", "kept")), bars("removable", x, rows.map((r) => r.of - r.keep), quiet(), { opacity: 0.35 })], layout: { height: 340, barmode: "stack", xaxis: { title: "layer", type: "category" }, yaxis: { title: "experts" } }, csv: table(["layer", "keep", "of", "worst lost energy"], rows.map((r) => [r.layer, r.keep, r.of, r.worst_lost_energy])) };
  },
});
FIGURES.push({
  id: "turn", section: "before", title: "How much each layer does", uses: [], when: () => M.redundant_layers != null,
  read: "How much the routed experts change the direction of the residual stream, 1 − cosine (log scale). Low points are layers that change little.",
  draw: () => {
    const rows = M.redundant_layers.turn, names = Object.keys(rows[0]).filter((k) => k !== "layer");
    return { traces: names.map((d) => line(d, rows.map((r) => String(r.layer)), rows.map((r) => r[d]), look("domain", d))), layout: { height: 340, xaxis: { title: "layer", type: "category" }, yaxis: { title: "1 − cos", ...logAxis } }, csv: table(["layer", ...names], rows.map((r) => [r.layer, ...names.map((d) => r[d])])) };
  },
});

FIGURES.push({
  id: "gone", section: "after", title: "What was removed", uses: [], when: () => A != null && A.layers.some((r) => r.lost),
  read: "Share of the original's output energy from the dropped experts, by domain and layer.",
  draw: () => {
    const names = Object.keys(A.layers[0].lost), x = A.layers.map((r) => String(r.layer));
    return { traces: names.map((d) => line(d, x, A.layers.map((r) => r.lost[d].energy), look("domain", d))), layout: { height: 340, xaxis: { title: "layer", type: "category" }, yaxis: { title: "lost output energy", tickformat: ".0%", rangemode: "tozero" } }, csv: table(["layer", "domain", "selections", "mass", "energy"], A.layers.flatMap((r) => names.map((d) => [r.layer, d, r.lost[d].selections, r.lost[d].mass, r.lost[d].energy]))) };
  },
});
FIGURES.push({
  id: "moved", section: "after", title: "How routing changed", uses: [], when: () => A != null && A.layers.some((r) => r.routing),
  read: "Share of the kept experts' slots that now go to a different expert, by domain. 0 means no change.",
  draw: () => {
    const names = Object.keys(A.layers[0].routing), x = A.layers.map((r) => String(r.layer));
    return { traces: names.map((d) => line(d, x, A.layers.map((r) => r.routing[d].moved), look("domain", d))), layout: { height: 340, xaxis: { title: "layer", type: "category" }, yaxis: { title: "moved share", tickformat: ".0%", rangemode: "tozero" } }, csv: table(["layer", "domain", "moved", "entropy before", "entropy after", "turn before", "turn after"], A.layers.flatMap((r) => names.map((d) => [r.layer, d, r.routing[d].moved, ...r.routing[d].routing_entropy, ...r.routing[d].turn]))) };
  },
});
FIGURES.push({
  id: "shift", section: "after", full: true, title: "Use of the kept experts before and after", uses: ["layer", "domain"], when: () => A != null && A.layers.some((r) => r.routing),
  read: "Share of the kept experts' slots, in the original and now. Ids are those of the original.",
  draw: (s) => {
    const row = A.layers.find((r) => r.layer === LAYERS[s.layer]), d = s.domain === "all" ? Object.keys(row.routing)[0] : s.domain, x = row.kept.map(String), found = row.routing[d];
    return { traces: [bars("before, " + d, x, found.before, quiet()), bars("after, " + d, x, found.after, look("domain", d))], layout: { height: 320, barmode: "group", xaxis: { title: "expert of the original", type: "category" }, yaxis: { title: "share", tickformat: ".0%" } }, csv: table(["expert", "before", "after"], row.kept.map((e, i) => [e, found.before[i], found.after[i]])) };
  },
});
FIGURES.push({
  id: "dropped", section: "after", full: true, title: "Kept, merged and dropped", uses: [], when: () => A != null,
  read: "Each row is a layer of the original. The colour bar says which experts were kept, merged into another, or dropped.",
  draw: () => {
    const size = Math.max(...A.layers.map((r) => r.kept.length + r.dropped.length)), state = (r, e) => (r.kept.includes(e) ? 2 : r.merged.some((m) => m.from.includes(e)) ? 1 : e < r.kept.length + r.dropped.length ? 0 : null), words = ["dropped", "merged", "kept"], parts = [css("--nonebg"), look("series", "merged").color, look("series", "kept").color];
    const z = A.layers.map((r) => range(size).map((e) => state(r, e)));
    return { traces: [heat(z, range(size), A.layers.map((r) => String(r.layer)), { from: -0.5, to: 2.5, unit: "", named: words, colours: parts.flatMap((c, i) => [[i / 3, c], [(i + 1) / 3, c]]) }, { text: z.map((row) => row.map((v) => words[v] ?? "")), hovertemplate: "layer %{y}, expert %{x}: %{text}<extra></extra>" })], layout: { height: mapHeight(), xaxis: { title: "expert of the original" }, yaxis: { title: "layer", type: "category", autorange: "reversed" } }, csv: table(["layer", "expert", "state"], z.flatMap((row, i) => row.map((v, e) => [A.layers[i].layer, e, words[v] ?? ""]))) };
  },
});
