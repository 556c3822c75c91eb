// Figures on what experts do. Each has its section, how to read it, its selectors, when it is shown, and what it draws.
const L = M.layers, LAYERS = L.map((entry) => entry.layer), labels = LAYERS.map(String);
const DOMAINS = M.data ? Object.keys(M.data.tokens) : [];
const has = (...path) => L.some((entry) => path.reduce((held, key) => (held == null ? held : held[key]), entry) != null);
const used = (entry, domain) => (domain === "all" ? entry.usage.all : entry.usage.domains[domain]);
const most = Math.max(...L.map((entry) => entry.num_experts)), experts = range(most);
const padded = (values) => experts.map((e) => (e < values.length ? values[e] : null));
const roles = L[0].static ? Object.keys(L[0].static.projections) : [];
const byLayer = (find) => L.map((entry) => { try { return find(entry) ?? null; } catch { return null; } });
const mapHeight = () => Math.max(230, 60 + 20 * L.length);
const FIGURES = [];

const SECTIONS = {
  use: ["What experts are used for", "How text of each domain is distributed over layers and experts."],
  alike: ["How similar experts are", "Similar experts can be merged or dropped with less loss than different ones."],
  router: ["The router", "Whether it prefers large outputs, how certain it is, and how evenly it balances the load."],
  before: ["Before pruning", "Shares of the dropped experts before tokens are re-routed. This is an estimate; evaluate measures the loss."],
  after: ["After pruning", "What the plan removed, and how tokens are routed now."],
};

// scales of heat maps
const EVEN = (top) => ({ from: 0, to: top, unit: "× even share", means: "1 is an even share, 0 is no use", colours: sequential() });
const USES = { usage: "share of routed slots × experts (1: even)", energy: "share of output energy × experts", mean_norm: "mean output norm", score: "mean router score × experts" };
FIGURES.push({
  id: "usage", section: "use", full: true, title: "Layer × expert", uses: ["domain", "shown"], when: () => has("usage"),
  read: "Each row is a layer, each cell an expert. Stronger colour means a larger share of the domain's text; 1 is an even share.",
  draw: (s) => {
    const norms = s.shown === "mean_norm", scaled = (values, n) => values.map((v) => (v == null || norms ? v : v * n));
    const z = L.map((entry) => padded(scaled(used(entry, s.domain)[s.shown], entry.num_experts))), top = largest(z);
    const scale = norms ? { from: 0, to: top, unit: "mean output norm", means: "0 is no output", colours: sequential() } : EVEN(top);
    return { traces: [heat(z, experts, labels, scale, { hovertemplate: "layer %{y}, expert %{x}<br>" + USES[s.shown] + ": %{z:.3g}<extra></extra>" })], layout: { height: mapHeight(), xaxis: { title: "expert" }, yaxis: { title: "layer", autorange: "reversed", type: "category" } }, csv: table(["layer", "expert", s.shown], z.flatMap((row, i) => row.map((v, e) => [LAYERS[i], e, v]))) };
  },
});
FIGURES.push({
  id: "flows", section: "use", title: "From domains to experts", uses: ["layer"], when: () => DOMAINS.length > 1,
  read: "Domains are on the left, experts of this layer on the right. The width of a ribbon is the share of the domain's slots.",
  draw: (s) => {
    const entry = L[s.layer], rows = DOMAINS.map((d) => used(entry, d).usage), n = entry.num_experts;
    const total = range(n).map((e) => rows.reduce((sum, row) => sum + row[e], 0));
    let order = range(n).sort((a, b) => total[b] - total[a]);
    const shown = n > 24 ? order.slice(0, 20) : order, rest = n > 24 ? order.slice(20) : [];
    const peak = (e) => rows.map((row) => row[e]).indexOf(Math.max(...rows.map((row) => row[e])));
    const nodes = shown.sort((a, b) => peak(a) - peak(b) || total[b] - total[a]).map((e) => ({ name: String(e), of: [e] }));
    if (rest.length) nodes.push({ name: rest.length + " others", of: rest });
    const D = DOMAINS.length, gap = 0.012, size = nodes.map((node) => node.of.reduce((sum, e) => sum + total[e], 0) / D);
    const unit = (1 - gap * (nodes.length - 1)), left = DOMAINS.map((_, d) => d * (1 / D) + 0.01), right = [];
    let at = 0;
    size.forEach((h, i) => { right.push(at); at += h * unit + gap; });
    const traces = [], notes = [], filled = right.slice(), here = (x, y) => ({ x, y: (y + 0.02) / 1.04, xref: "paper", yref: "paper" });
    DOMAINS.forEach((name, d) => {
      let from = left[d];
      const scale = 1 / D - 0.02;
      nodes.forEach((node, i) => {
        const share = node.of.reduce((sum, e) => sum + rows[d][e], 0), a = share * scale, b = (share / D) * unit;
        const x = [], up = [], low = [];
        for (let k = 0; k <= 12; k++) { const t = k / 12, w = t * t * (3 - 2 * t); x.push(t); up.push(1 - (from + w * (filled[i] - from))); low.push(1 - (from + a + w * (filled[i] + b - from - a))); }
        if (share > 0.002) traces.push({ type: "scatter", mode: "lines", x: x.concat(x.slice().reverse()), y: up.concat(low.slice().reverse()), fill: "toself", fillcolor: look("domain", name).color + "88", line: { width: 0.5, color: look("domain", name).color }, hoveron: "fills", hoverinfo: "text", text: `${name} → expert ${node.name}: ${percent(share)}`, showlegend: false });
        from += a; filled[i] += b;
      });
      notes.push({ ...here(-0.02, 1 - (left[d] + 0.5 / D - 0.01)), text: name, showarrow: false, xanchor: "right", font: { color: look("domain", name).color, size: 12 } });
    });
    nodes.forEach((node, i) => notes.push({ ...here(1.01, 1 - (right[i] + (size[i] * unit) / 2)), text: node.name, showarrow: false, xanchor: "left", font: { size: 11, color: css("--soft") } }));
    return { traces, layout: { height: Math.max(320, 18 * nodes.length), annotations: notes, hovermode: "closest", margin: { l: 70, r: 60, t: 8, b: 8 }, xaxis: { visible: false, range: [0, 1], fixedrange: true }, yaxis: { visible: false, range: [-0.02, 1.02], fixedrange: true } }, csv: table(["domain", "expert", "share"], DOMAINS.flatMap((d, i) => rows[i].map((v, e) => [d, e, v]))) };
  },
});
FIGURES.push({
  id: "special", section: "use", title: "How specialised the layers are", uses: [], when: () => has("usage", "specialisation", "information_share"),
  read: "Share of the domain information that expert choice explains. 0 is no specialisation, 1 is one domain per expert. Grey is chance for saliency (permuted sequences).",
  draw: () => {
    const most = Math.log(Math.min(DOMAINS.length, M.model.num_experts)), info = byLayer((e) => e.usage.specialisation.information_share), chance = byLayer((e) => e.usage.specialisation.saliency_information_null / most), mass = byLayer((e) => e.usage.specialisation.saliency_information / most);
    return { traces: [line("usage", labels, info, look("series", "usage")), line("saliency (EASY-EP)", labels, mass, look("series", "saliency")), line("chance for saliency", labels, chance, quiet())], layout: { height: 320, xaxis: { title: "layer", type: "category" }, yaxis: { title: "share of the maximum information", rangemode: "tozero" } }, csv: table(["layer", "usage", "saliency", "chance"], LAYERS.map((l, i) => [l, info[i], mass[i], chance[i]])) };
  },
});
FIGURES.push({
  id: "stability", section: "use", title: "How few demonstrations are enough", uses: ["layer"], when: () => L.some((e) => e.usage && Object.keys(e.usage.stability).length),
  read: "Overlap of the half of the experts chosen from n sequences with the half chosen from all others. If lines are high, few demonstrations are enough. Dotted is chance.",
  draw: (s) => {
    const found = L[s.layer].usage.stability, names = Object.keys(found), traces = names.map((d) => line(d, found[d].map((r) => r.demonstrations), found[d].map((r) => r.overlap), look("domain", d), { error_y: { type: "data", array: found[d].map((r) => r.deviation), thickness: 1, width: 2, color: look("domain", d).color } }));
    if (names.length) traces.push(line("chance", found[names[0]].map((r) => r.demonstrations), found[names[0]].map((r) => r.chance), quiet(), { mode: "lines" }));
    return { traces, layout: { height: 320, xaxis: { title: "sequences", type: "log", tickvals: [1, 2, 4, 8, 16, 32, 64, 128] }, yaxis: { title: "overlap", range: [0, 1.05] } }, csv: table(["domain", "demonstrations", "overlap", "deviation", "chance"], names.flatMap((d) => found[d].map((r) => [d, r.demonstrations, r.overlap, r.deviation, r.chance]))) };
  },
});
const S = M.super_experts;
FIGURES.push({
  id: "super", section: "use", title: "Experts with extreme outputs", uses: [], when: () => S != null,
  read: "Each point is an expert: its largest output norm relative to the median expert's (log scale). Above the dotted line are super-experts, which must be kept.",
  draw: () => {
    const points = L.flatMap((entry, i) => entry.usage.all.max_norm.map((value, e) => ({ layer: labels[i], expert: e, value, far: value > S.bar }))).filter((p) => p.value > 0);
    const part = (name, far) => { const at = points.filter((p) => p.far === far), drawn = look("series", name); return { type: "scatter", mode: "markers", name, x: at.map((p) => p.layer), y: at.map((p) => p.value / S.median), text: at.map((p) => "expert " + p.expert), marker: { size: far ? 10 : 6, color: drawn.color, symbol: drawn.symbol, opacity: far ? 1 : 0.55 }, hovertemplate: "layer %{x}, %{text}: %{y:.3g} × the median<extra></extra>" }; };
    const bar = { type: "scatter", mode: "lines", name: "bar", x: labels, y: labels.map(() => S.bar / S.median), line: { dash: "dot", color: look("series", "super-experts").color }, hoverinfo: "skip" };
    return { traces: [part("experts", false), ...(S.experts.length ? [part("super-experts", true)] : []), bar], layout: { height: 340, hovermode: "closest", xaxis: { title: "layer", type: "category", categoryorder: "array", categoryarray: labels }, yaxis: { title: "largest output / median", ...logAxis } }, csv: table(["layer", "expert", "largest output norm", "super-expert"], points.map((p) => [p.layer, p.expert, p.value, p.far ? 1 : 0])) };
  },
});
FIGURES.push({
  id: "tokens", section: "use", title: "Typical tokens of each expert", uses: ["layer"], when: () => has("sample"), html: true,
  read: "Tokens that are routed to the expert most often relative to its usual rate, among those seen at least five times. The number is that ratio.",
  draw: (s) => {
    const rows = (L[s.layer].sample || { loved_tokens: [] }).loved_tokens;
    const clean = (t) => (t.text === undefined ? "#" + t.token : t.text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "␣") || "∅");
    const body = rows.map((list, e) => `<tr><td>${e}</td><td>${list.map((t) => `<span class="token" title="seen ${t.seen}, here ${percent(t.routed)}">${esc(clean(t))} ${t.lift.toFixed(1)}×</span>`).join("") || "–"}</td></tr>`).join("");
    return { html: `<div class="wide tall"><table><tr><th>expert</th><th>tokens</th></tr>${body}</table></div>`, csv: table(["expert", "token", "text", "seen", "routed", "lift"], rows.flatMap((list, e) => list.map((t) => [e, t.token, t.text ?? "", t.seen, t.routed, t.lift]))) };
  },
});

const MATRICES = {};
if (has("sample", "output_angular")) MATRICES["outputs, angular"] = [(e) => e.sample.output_angular, (e) => e.sample.output_members, "angular"];
if (has("sample", "activation_cosine")) MATRICES["activations, cosine"] = [(e) => e.sample.activation_cosine, null, "cosine"];
if (L[0].static) MATRICES["router rows, cosine"] = [(e) => e.static.router_cosine, null, "cosine"];
for (const role of roles) MATRICES[`mean ${role} neurons, cosine`] = [(e) => e.static.projections[role].neuron_cosine, (e) => e.static.projections[role].neuron_members, "cosine"];
for (const role of roles) MATRICES[`${role} matrices, cosine`] = [(e) => e.static.projections[role].matrix_cosine, (e) => e.static.projections[role].matrix_members, "cosine"];
if (has("usage", "coselection_lift")) MATRICES["chosen together, times chance"] = [(e) => e.usage.coselection_lift, null, "lift"];
const MOST_LIFT = 4;
// the scale of a matrix over all layers: each kind of similarity has its own, around the value that unrelated experts have
function scaleOf(name) {
  const [find, , kind] = MATRICES[name], held = L.map((entry) => { try { return find(entry) || []; } catch { return []; } });
  const off = held.flatMap((flat) => { const full = square(flat); return full.flatMap((row, i) => row.slice(0, i)); }).filter((v) => v != null), same = "the scale is the same in all layers";
  if (kind === "lift") { const top = Math.max(2, Math.min(MOST_LIFT, largest(off))), more = largest(off) > top ? `; more than ${top} has the colour of ${top}` : ""; return { from: 0, to: top, unit: "× chance", means: `1 is chance, 0 is never together${more}; ${same}`, colours: around(top) }; }
  const middle = kind === "angular" ? 0.5 : 0, reach = Math.max(0.05, largest(off.map((v) => Math.abs(v - middle))));
  return kind === "angular" ? { from: 0.5 - reach, to: 0.5 + reach, unit: "angular similarity", means: `0.5 is unrelated, 1 the same direction, 0 the opposite; ${same}`, colours: diverging() } : { from: -reach, to: reach, unit: "cosine", means: `0 is unrelated, 1 the same direction, -1 the opposite; ${same}`, colours: diverging() };
}
FIGURES.push({
  id: "matrix", section: "alike", title: "Expert × expert", uses: ["layer", "matrix"], when: () => Object.keys(MATRICES).length > 0,
  read: "Similarity of two experts of the layer, sorted so that similar experts are adjacent. Strong blocks off the diagonal are groups of similar experts.",
  draw: (s) => {
    const [find, members] = MATRICES[s.matrix], full = square(find(L[s.layer])), names = members ? members(L[s.layer]) : full.map((_, i) => String(i));
    const order = clustered(full), z = order.map((i) => order.map((j) => (i === j ? null : full[i][j]))), who = order.map((i) => names[i]);
    return { traces: [heat(z, who, who, scaleOf(s.matrix), { hovertemplate: "expert %{y} and %{x}: %{z:.3f}<extra></extra>" })], layout: { height: 420, xaxis: { type: "category", title: "expert, clustered" }, yaxis: { type: "category", autorange: "reversed" } }, csv: table(["expert", "expert", s.matrix], full.flatMap((row, i) => row.slice(0, i).map((v, j) => [names[i], names[j], v]))) };
  },
});
FIGURES.push({
  id: "depth", section: "alike", title: "Similarity by depth", uses: [], when: () => L.length > 1,
  read: "Mean similarity over expert pairs in every layer; dotted is unrelated: 0.5 for angular similarity, 0 for cosines, which have an axis each. Falling lines mean that experts differ more with depth; a jump at the end is an outlier.",
  draw: () => {
    const outputs = byLayer((e) => e.sample.output_similarity), cosines = [["router rows", byLayer((e) => e.static.router_similarity), look("series", "router rows")]];
    for (const role of roles) cosines.push([`mean ${role} neurons`, byLayer((e) => e.static.projections[role].neuron_similarity), look("series", role)]);
    for (const role of roles) cosines.push([`${role} matrices`, byLayer((e) => e.static.projections[role].matrix_similarity), { ...look("series", role), dash: "dot", symbol: look("series", role).symbol + "-open" }]);
    const kept = cosines.filter(([, values]) => values.some((v) => v != null)), both = outputs.some((v) => v != null), all = both ? [["outputs (angular)", outputs], ...kept] : kept;
    const traces = kept.map(([name, values, drawn]) => line(name, labels, values, drawn));
    if (both) traces.unshift(line("outputs (angular)", labels, outputs, look("series", "outputs"), { yaxis: "y2" }));
    // unrelated experts have 0 on one scale and 0.5 on the other: two axes, each with its line
    const at = (y, yref) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, yref, line: { color: css("--soft"), width: 1, dash: "dot" } });
    const upper = both ? { yaxis2: { title: "angular, 0 to 1", domain: [0.58, 1], range: [Math.min(0.48, ...outputs.filter((v) => v != null)) - 0.02, largest(outputs, 0.6) + 0.02] } } : {};
    return { traces, layout: { height: both ? 520 : 420, shapes: [at(0, "y"), ...(both ? [at(0.5, "y2")] : [])], xaxis: { title: "layer", type: "category", anchor: "y" }, yaxis: { title: "cosine, −1 to 1", domain: [0, both ? 0.5 : 1], rangemode: "tozero" }, ...upper }, csv: table(["layer", ...all.map(([name]) => name)], LAYERS.map((l, i) => [l, ...all.map(([, values]) => values[i])])) };
  },
});
FIGURES.push({
  id: "pca", section: "alike", title: "Experts on a plane", uses: ["layer", "role"], when: () => roles.length > 0,
  read: "The two principal components of the experts' whole matrices. An isolated point is an unusual expert; close points are similar experts.",
  draw: (s) => {
    const found = L[s.layer].static.projections[s.role], p = found.pca;
    return { traces: [{ type: "scatter", mode: "markers+text", x: p.map((v) => v[0]), y: p.map((v) => v[1]), text: p.map((_, e) => String(e)), textposition: "top center", textfont: { size: 10, color: css("--soft") }, marker: { size: 9, color: look("series", "experts").color }, customdata: found.effective_rank, hovertemplate: "expert %{text}<br>effective rank %{customdata:.1f} of " + found.effective_rank_of + "<extra></extra>" }], layout: { height: 340, xaxis: { title: `component 1 (${percent(found.pca_explained[0])})` }, yaxis: { title: `component 2 (${percent(found.pca_explained[1])})` } }, csv: table(["expert", "component 1", "component 2", "norm", "effective rank"], p.map((v, e) => [e, v[0], v[1], found.norm[e], found.effective_rank[e]])) };
  },
});
FIGURES.push({
  id: "match", section: "alike", title: "Neurons after matching", uses: ["role"], when: () => roles.length > 0 && L.some((e) => e.static.projections[roles[0]].match),
  read: "Mean cosine of best-matched neurons of two experts (error bars: over pairs), compared with shuffled neurons. Above that, experts share neurons in a different order.",
  draw: (s) => {
    const of = (key) => byLayer((e) => e.static.projections[s.role].match[key]), found = of("similarity"), error = of("error"), none = of("null"), plain = byLayer((e) => { const v = e.static.projections[s.role].match.cosine_unordered; return v.reduce((a, b) => a + b, 0) / v.length; });
    return { traces: [line("matched", labels, found, look("series", "matched"), { error_y: { type: "data", array: error, color: look("series", "matched").color, thickness: 1 } }), line("matched, shuffled (null)", labels, none, quiet()), line("unmatched", labels, plain, look("series", "unmatched"))], layout: { height: 340, xaxis: { title: "layer", type: "category" }, yaxis: { title: "cosine" } }, csv: table(["layer", "matched", "error", "null", "as they stand"], LAYERS.map((l, i) => [l, found[i], error[i], none[i], plain[i]])) };
  },
});
FIGURES.push({
  id: "dense", section: "alike", title: "Nearest neuron of the dense model", uses: ["role"], when: () => roles.length > 0 && L.some((e) => e.static.projections[roles[0]].dense_match),
  read: "For each expert, the mean cosine of its neurons to their nearest neuron in the dense FFN of the same layer. 1 means copied.",
  draw: (s) => {
    const z = L.map((e) => padded(e.static.projections[s.role].dense_match || []));
    return { traces: [heat(z, experts, labels, { from: 0, to: 1, unit: "cosine", means: "0 is unrelated, 1 is copied", colours: sequential() }, { hovertemplate: "layer %{y}, expert %{x}: %{z:.3f}<extra></extra>" })], layout: { height: mapHeight(), xaxis: { title: "expert" }, yaxis: { title: "layer", autorange: "reversed", type: "category" } }, csv: table(["layer", "expert", "cosine"], z.flatMap((row, i) => row.map((v, e) => [LAYERS[i], e, v]))) };
  },
});
FIGURES.push({
  id: "r2", section: "alike", title: "Are router rows similar where neurons are?", uses: [], when: () => roles.length > 0 && L.some((e) => e.static.router_expert[roles[0]]),
  read: "R² between the similarity of router rows and of mean neurons. Observation 1 holds if only gate has high bars. The dotted line is chance.",
  draw: () => {
    const of = (role, key) => byLayer((e) => e.static.router_expert[role][key]), rows = roles.map((role) => of(role, "r2")), chance = of(roles[0], "null");
    return { traces: [...roles.map((role, i) => bars(role, labels, rows[i], look("series", role), { customdata: of(role, "p"), hovertemplate: `${role}, layer %{x}: R² %{y:.3f}, p %{customdata:.3g}<extra></extra>` })), line("chance", labels, chance, quiet(), { mode: "lines" })], layout: { height: 340, barmode: "group", xaxis: { title: "layer", type: "category" }, yaxis: { title: "R²" } }, csv: table(["layer", ...roles, "chance"], LAYERS.map((l, i) => [l, ...rows.map((row) => row[i]), chance[i]])) };
  },
});

FIGURES.push({
  id: "scatter", section: "router", title: "Output norm and router score", uses: ["layer"], when: () => has("sample"),
  read: "Each point is an expert on a token. Right of 1, its output is larger than the token's average; the vertical axis is the router score.",
  draw: (s) => {
    const p = L[s.layer].sample.points, pick = (flag) => range(p.score.length).filter((i) => p.selected[i] === flag);
    const part = (name, flag, drawn) => { const at = pick(flag); return { type: "scatter", mode: "markers", name, x: at.map((k) => p.relative_norm[k]), y: at.map((k) => p.score[k]), text: at.map((k) => "expert " + p.expert[k]), marker: { size: 5, color: drawn.color, symbol: drawn.symbol, opacity: 0.65 }, hovertemplate: "%{text}<br>norm %{x:.2f} × mean, score %{y:.3f}<extra></extra>" }; };
    return { traces: [part("not selected", 0, quiet()), part("selected", 1, look("series", "selected"))], layout: { height: 360, hovermode: "closest", xaxis: { title: "output norm / the token's mean" }, yaxis: { title: "router score" } }, csv: table(["expert", "relative norm", "score", "selected"], p.score.map((v, i) => [p.expert[i], p.relative_norm[i], v, p.selected[i]])) };
  },
});
FIGURES.push({
  id: "ranks", section: "router", title: "Norm rank and score rank", uses: ["layer"], when: () => has("sample"),
  read: "How often the expert of this norm rank has that score rank, relative to chance. A strong diagonal means that the router ranks experts by output norm.",
  draw: (s) => {
    const lifts = (held) => { const n = held.length, sum = held.flat().reduce((a, b) => a + b, 0); return held.map((row) => row.map((v) => (v * n * n) / sum)); };
    const counts = L[s.layer].sample.rank_counts, n = counts.length, z = lifts(counts), at = range(n).map((i) => i + 1);
    const top = Math.max(2, largest(L.filter((e) => e.sample).map((e) => lifts(e.sample.rank_counts)))), scale = { from: 0, to: top, unit: "× chance", means: "1 is chance, 0 is never; the scale is the same in all layers", colours: around(top) };
    return { traces: [heat(z, at, at, scale, { customdata: counts, hovertemplate: "score rank %{y}, norm rank %{x}: %{z:.2f} × chance (%{customdata})<extra></extra>" })], layout: { height: 360, xaxis: { title: "norm rank, largest right" }, yaxis: { title: "score rank, highest up" } }, csv: table(["score rank", "norm rank", "tokens"], counts.flatMap((row, i) => row.map((v, j) => [i + 1, j + 1, v]))) };
  },
});
FIGURES.push({
  id: "rho", section: "router", title: "Does the router prefer large outputs?", uses: [], when: () => has("sample"),
  read: "Rank correlation of output norm and router score in every layer, with 95 % intervals over texts. Values above 0 support observation 2.",
  draw: () => {
    const r = byLayer((e) => e.sample.norm_score_rho), mean = r.map((v) => v && v.mean), up = r.map((v) => (v && v.high != null ? v.high - v.mean : 0)), down = r.map((v) => (v && v.low != null ? v.mean - v.low : 0)), lift = byLayer((e) => e.sample.largest_norm_top_scored.mean * e.num_experts);
    return { traces: [line("rank correlation", labels, mean, look("series", "rank correlation"), { customdata: lift, error_y: { type: "data", symmetric: false, array: up, arrayminus: down, color: look("series", "rank correlation").color, thickness: 1 }, hovertemplate: "layer %{x}: ρ %{y:.3f}<br>largest output top-scored %{customdata:.2f} × chance<extra></extra>" })], layout: { height: 320, showlegend: false, xaxis: { title: "layer", type: "category" }, yaxis: { title: "ρ of norm and score", zeroline: true, zerolinewidth: 2 } }, csv: table(["layer", "rho", "low", "high", "lift of the largest norm"], LAYERS.map((l, i) => [l, mean[i], r[i] && r[i].low, r[i] && r[i].high, lift[i]])) };
  },
});
FIGURES.push({
  id: "health", section: "router", title: "Router entropy and load balance", uses: ["domain"], when: () => has("usage"),
  read: "Load near 1 is an even use of all experts. Scores near 1 mean an uncertain router, near 0 a certain one.",
  draw: (s) => {
    const of = (key) => byLayer((e) => used(e, s.domain)[key]), load = of("load_entropy_share"), sure = of("routing_entropy_share"), unused = of("unused"), cv = of("load_cv");
    return { traces: [line("load (entropy of use)", labels, load, look("series", "load"), { customdata: unused, hovertemplate: "layer %{x}: %{y:.3f}, %{customdata} unused<extra></extra>" }), line("router scores (mean entropy)", labels, sure, look("series", "router scores"))], layout: { height: 320, xaxis: { title: "layer", type: "category" }, yaxis: { title: "share of the maximum entropy", range: [0, 1.05] } }, csv: table(["layer", "load", "scores", "unused", "load cv"], LAYERS.map((l, i) => [l, load[i], sure[i], unused[i], cv[i]])) };
  },
});
