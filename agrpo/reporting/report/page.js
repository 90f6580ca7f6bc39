"use strict";
// Draws the page from the JSON beside it. Everything from a run is text to the browser: only textContent and
// attributes are set from data, and the page's policy forbids any other script.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 6, TITLES = { agrpo: "A-GRPO", reward: "Reward model", sft: "SFT" };
const PAGE_ROWS = 25;
let data = JSON.parse(document.getElementById("data").textContent);
const view = { sort: "step", down: true, text: "", least: "", most: "", advantage: "all", run: "all", rows: PAGE_ROWS, colour: "log_ratio" };

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  fill(node, attributes);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  fill(node, attributes);
  if (text !== undefined) node.textContent = text;
  return node;
}
function fill(node, attributes) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
}
const colour = (i) => `var(--c${i % COLOURS})`;
function number(value, percent) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (percent) return `${(100 * value).toFixed(1)}%`.replace(/^-0\.0%/, "0.0%").replace("-", "−");
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(1).replace("-", "−").replace("e-", "e−");
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4).replace("-", "−");
}
function duration(seconds) {
  const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60);
  return h ? `${h} h ${String(m).padStart(2, "0")} min` : m ? `${m} min ${String(s % 60).padStart(2, "0")} s` : `${s} s`;
}

// What is drawn. A line: [metric, or the first of several that is there, label]. marks: measured now and then.
const CHARTS = {
  agrpo: [
    ["Learning", [
      { title: "Accuracy", unit: "share right", percent: true, marks: true, lines: [["evaluation/pass1", "pass@1"], ["evaluation/greedy", "greedy"], ["evaluation/pass8", "pass@8"]] },
      { title: "Reward", unit: "mean of a step", smooth: true, lines: [["reward", "reward"]] },
      { title: "KL to the reference", unit: "symmetric, nats a token", smooth: true, lines: [[["agrpo/kl_symmetric", "kl"], "KL"]] },
      { title: "Entropy", unit: "nats a token", smooth: true, lines: [["entropy", "entropy"]] },
      { title: "Advantage variance", unit: "of a completion", smooth: true, lines: [["agrpo/advantage_variance", "variance"]] },
      { title: "Groups that teach nothing", unit: "rewards all equal", percent: true, smooth: true, lines: [["frac_reward_zero_std", "share"]] },
    ]],
    ["Reward components", "components"],
    ["Length of completions", [
      { title: "Length", unit: "tokens", smooth: true, band: ["completions/length_p10", "completions/length_p90"], told: "band: 10% to 90%", lines: [["completions/mean_length", "mean"]] },
      { title: "Cut at the limit", unit: "share of completions", percent: true, smooth: true, lines: [["completions/clipped_ratio", "share"]] },
      { histogram: true, title: "Lengths of the samples", unit: "tokens" },
    ]],
    ["Controllers", [
      { title: "β, weight of the divergence", bound: "beta", lines: [["agrpo/beta", "β"]] },
      { title: "ε, clip range", bound: "epsilon", lines: [["agrpo/epsilon", "ε"]] },
      { title: "λ, share of the preference loss", bound: "lambda", moves: true, lines: [["agrpo/lambda", "λ"]] },
      { title: "Preference uncertainty", unit: "bits", smooth: true, lines: [["agrpo/uncertainty", "uncertainty"]] },
    ]],
    ["Optimisation", [
      { title: "Loss", smooth: true, lines: [["loss", "all"], ["agrpo/policy_loss", "policy"], ["agrpo/group_loss", "preference"]] },
      { title: "Gradient norm", unit: "before clipping", smooth: true, lines: [["grad_norm", "norm"]] },
      { title: "Clipped tokens", unit: "share", percent: true, smooth: true, lines: [["clip_ratio/region_mean", "share"]] },
      { title: "Effective sample size", unit: "share of tokens", percent: true, smooth: true, lines: [["agrpo/effective_sample_size", "share"]] },
      { title: "Learning rate", lines: [["learning_rate", "rate"]] },
    ]],
    ["Throughput and memory", [
      { title: "Throughput", unit: "completion tokens a second", smooth: true, zero: true, lines: [["throughput/completion_tokens_per_s", "tokens/s"]] },
      { title: "Time of a step", unit: "seconds", smooth: true, zero: true, lines: [["time/step_s", "step"], ["time/generate_s", "generate"], ["time/update_s", "update"], ["time/reward_s", "reward"]] },
      { title: "Peak memory", unit: "GiB", zero: true, lines: [["memory/peak_gib", "peak"]] },
    ]],
  ],
  reward: [
    ["", [
      { title: "Pairwise accuracy", unit: "share right", percent: true, smooth: true, lines: [[["pairwise_accuracy", "accuracy"], "training"], ["evaluation/pairwise_accuracy", "held out"]] },
      { title: "Loss", smooth: true, lines: [["loss", "loss"]] },
      { title: "λ and uncertainty", lines: [["agrpo/lambda", "λ"], ["agrpo/uncertainty", "uncertainty"]] },
      { title: "Gradient norm", unit: "before clipping", smooth: true, lines: [["grad_norm", "norm"]] },
      { title: "Learning rate", lines: [["learning_rate", "rate"]] },
      { title: "Throughput", unit: "tokens a second", smooth: true, zero: true, lines: [["throughput/completion_tokens_per_s", "tokens/s"]] },
    ]],
  ],
  sft: [
    ["", [
      { title: "Loss", unit: "nats a token", smooth: true, lines: [["loss", "training"], ["evaluation/loss", "validation"]] },
      { title: "Accuracy", unit: "share right", percent: true, marks: true, lines: [["evaluation/pass1", "pass@1"], ["evaluation/greedy", "greedy"], ["evaluation/pass8", "pass@8"]] },
      { title: "Gradient norm", unit: "before clipping", smooth: true, lines: [["grad_norm", "norm"]] },
      { title: "Learning rate", lines: [["learning_rate", "rate"]] },
      { title: "Throughput", unit: "tokens a second", smooth: true, zero: true, lines: [["throughput/completion_tokens_per_s", "tokens/s"]] },
    ]],
  ],
};

// Curves

function found(stage, names) {
  for (const name of [names].flat()) if (stage.series[name] && stage.series[name][0].length) return stage.series[name];
  return null;
}
const widthOf = (values) => (values.length < 20 ? 1 : Math.max(5, Math.round(values.length / 20)));
function smoothed(values) {
  const width = widthOf(values);
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i + 1 - width), i + 1);
    return part.reduce((a, b) => a + b, 0) / part.length;
  });
}
// The value of a curve at a step: of the last point not after it.
function valueAt([steps, values], step) {
  let low = 0, high = steps.length - 1;
  if (step < steps[0]) return null;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle - 1;
  }
  return values[low];
}
function families() {
  const names = [...new Set(data.runs.map((run) => run.family))];
  return names.map((name) => [name, data.runs.filter((run) => run.family === name)]);
}
// Mean, least and greatest over the runs of a family, at the steps of the first of them.
function overSeeds(curves) {
  const steps = curves[0][0].filter((step) => curves.every((c) => step >= c[0][0] && step <= c[0][c[0].length - 1]));
  const rows = steps.map((step) => curves.map((curve) => valueAt(curve, step)));
  return { mean: [steps, rows.map((r) => r.reduce((a, b) => a + b, 0) / r.length)], low: [steps, rows.map((r) => Math.min(...r))], high: [steps, rows.map((r) => Math.max(...r))] };
}
// [{label, colour, curve, raw, band}] of a chart.
function linesOf(spec, stage) {
  if (data.runs.length === 1) {
    const shown = data.runs[0].stages[stage];
    return spec.lines.map(([names, label], i) => {
      const curve = found(shown, names);
      if (!curve) return null;
      const mean = spec.smooth && widthOf(curve[1]) > 1 ? [curve[0], smoothed(curve[1])] : null;
      const ends = i === 0 && spec.band ? spec.band.map((name) => found(shown, name)) : [];
      const band = ends.length && ends.every(Boolean) ? ends : null;
      return { label, colour: colour(i), curve: mean || curve, raw: mean ? curve : null, band, marks: spec.marks && curve[0].length < 60 };
    }).filter(Boolean);
  }
  return families().map(([name, runs], i) => {
    const curves = runs.map((run) => run.stages[stage] && found(run.stages[stage], spec.lines[0][0])).filter(Boolean);
    if (!curves.length) return null;
    const ready = curves.map((curve) => spec.smooth ? [curve[0], smoothed(curve[1])] : curve);
    if (ready.length === 1) return { label: name, colour: colour(i), curve: ready[0], raw: null, band: null, marks: spec.marks && ready[0][0].length < 60 };
    const { mean, low, high } = overSeeds(ready);
    return mean[0].length ? { label: `${name} (${ready.length})`, colour: colour(i), curve: mean, raw: null, band: [low, high], marks: false } : null;
  }).filter(Boolean);
}
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const out = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) out.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return out;
}
function tickText(value, all, percent) {
  const step = all.length > 1 ? Math.abs(all[1] - all[0]) : Math.abs(value) || 1;
  if (percent) return `${(100 * value).toFixed(Math.max(0, -Math.floor(Math.log10(100 * step) + 1e-9)))}%`;
  if (value === 0) return "0";
  if (Math.max(...all.map(Math.abs)) >= 10000) return `${+(value / 1000).toFixed(step < 1000 ? 1 : 0)}k`.replace("-", "−");
  if (step < 0.0005) return value.toExponential(step < 0.1 * Math.abs(value) ? 1 : 0).replace("e-", "e−");
  return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9))).replace("-", "−");
}
function path([steps, values], x, y) {
  return steps.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("");
}
function chart(spec, stage) {
  const lines = linesOf(spec, stage);
  if (!lines.length) return null;
  const at = el("span", { class: "at" }, spec.unit || "");
  const values = lines.map(() => el("b"));
  const legend = el("div", { class: "legend" }, lines.map((line, i) => el("span", {}, key(line.colour), `${line.label} `, values[i])));
  if (spec.told && lines[0].band && data.runs.length === 1) legend.append(el("span", {}, spec.told));
  const surface = svg("svg", { role: "img", tabindex: "0", "aria-label": `${spec.title}: ${lines.map((l) => `${l.label} ends at ${number(l.curve[1].at(-1), spec.percent)}`).join(", ")}. Arrow keys move through the steps.` });
  const figure = el("figure", { class: "chart" }, el("figcaption", {}, el("span", { class: "name" }, spec.title), at), legend, surface);
  const first = 0, last = Math.max(...lines.map((line) => line.curve[0].at(-1)));
  const everything = lines.flatMap((line) => [line.curve, ...(line.raw ? [line.raw] : []), ...(line.band || [])]).flatMap((curve) => curve[1]);
  let low = everything.reduce((a, b) => Math.min(a, b)), high = everything.reduce((a, b) => Math.max(a, b));
  if (spec.moves && low === 0 && high === 0) return null;
  if (spec.zero) low = Math.min(0, low);
  const varies = high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)); // rounding alone is no curve
  const pad = varies ? 0.06 * (high - low) : Math.abs(high) * 0.1 || (spec.percent ? 0.05 : 0.5);
  const bounded = (value, sign) => spec.percent && (sign < 0 ? low >= 0 : high <= 1) ? Math.min(1, Math.max(0, value)) : value;
  low = spec.zero && low === 0 ? 0 : bounded(low - pad, -1);
  high = bounded(high + pad, 1);
  const bounds = (spec.bound && data.runs.length === 1 && data.runs[0].stages[stage].bounds[spec.bound] || []).filter((b) => b >= low && b <= high);
  if (bounds.length) legend.append(el("span", {}, "dashed: its bound"));
  let cursor = null, x = null, size = null;

  function tell(step) {
    at.textContent = step === null ? spec.unit || "" : `step ${step}`;
    lines.forEach((line, i) => { values[i].textContent = number(step === null ? line.curve[1].at(-1) : valueAt(line.curve, step), spec.percent); });
    if (cursor) { cursor.setAttribute("visibility", step === null ? "hidden" : "visible"); if (step !== null) { cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); } }
  }
  function draw() {
    const width = Math.max(200, surface.clientWidth), height = 172, yTicks = ticks(low, high, 5);
    const left = 10 + 6.4 * Math.max(...yTicks.map((t) => tickText(t, yTicks, spec.percent).length)), right = width - 8, top = 8, bottom = height - 22;
    size = { left, right };
    x = (step) => left + (right - left) * (last === first ? 0.5 : (step - first) / (last - first));
    const y = (value) => bottom - (bottom - top) * (value - low) / (high - low);
    surface.setAttribute("viewBox", `0 0 ${width} ${height}`);
    surface.replaceChildren();
    for (const t of yTicks) {
      surface.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) }));
      surface.append(svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, tickText(t, yTicks, spec.percent)));
    }
    const xTicks = ticks(first, last, Math.max(2, Math.round(width / 90))).filter((t) => Number.isInteger(t));
    for (const t of xTicks) surface.append(svg("text", { x: x(t), y: height - 5, "text-anchor": x(t) > right - 14 ? "end" : "middle" }, tickText(t, xTicks, false)));
    for (const b of bounds) surface.append(svg("line", { class: "bound", x1: left, x2: right, y1: y(b), y2: y(b) }));
    for (const line of lines) {
      if (line.band) {
        const [from, to] = line.band, back = [[...to[0]].reverse(), [...to[1]].reverse()];
        surface.append(svg("path", { d: `${path(from, x, y)}${path(back, x, y).replace("M", "L")}Z`, fill: line.colour, opacity: 0.16 }));
      }
      if (line.raw) surface.append(svg("path", { d: path(line.raw, x, y), fill: "none", stroke: line.colour, "stroke-width": 1, opacity: 0.3 }));
    }
    for (const line of lines) {
      surface.append(svg("path", { d: path(line.curve, x, y), fill: "none", stroke: line.colour, "stroke-width": 1.9, "stroke-linejoin": "round" }));
      if (line.marks) line.curve[0].forEach((step, i) => surface.append(svg("circle", { cx: x(step), cy: y(line.curve[1][i]), r: 3, fill: line.colour })));
    }
    cursor = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    surface.append(cursor);
    tell(null);
  }
  let focused = null;
  surface.addEventListener("pointermove", (event) => {
    const box = surface.getBoundingClientRect(), place = (event.clientX - box.left - size.left) / (size.right - size.left);
    tell(Math.max(1, Math.min(last, Math.round(first + place * (last - first)))));
  });
  surface.addEventListener("pointerleave", () => tell(null));
  surface.addEventListener("blur", () => { focused = null; tell(null); });
  surface.addEventListener("keydown", (event) => {
    const stride = Math.max(1, Math.round(last / 60)), moves = { ArrowLeft: -stride, ArrowRight: stride, Home: -last, End: last };
    if (!(event.key in moves)) return;
    event.preventDefault();
    focused = Math.max(1, Math.min(last, (focused === null ? last : focused) + moves[event.key]));
    tell(focused);
  });
  drawings.push([surface, draw]);
  return figure;
}
function key(shade) {
  const mark = el("span", { class: "key", "aria-hidden": "true" });
  mark.style.background = shade;
  return mark;
}
// Bars of the sampled completions' lengths in the first and in the last third of the steps.
function histogram(spec) {
  const rows = data.runs[0].samples.filter((row) => row.tokens > 0);
  if (data.runs.length > 1 || rows.length < 12) return null;
  const most = Math.max(...rows.map((row) => row.tokens)), end = Math.max(...rows.map((row) => row.step)), bins = Math.min(14, most);
  const parts = [["first third", rows.filter((row) => row.step <= end / 3)], ["last third", rows.filter((row) => row.step > (2 * end) / 3)]];
  const shares = parts.map(([, part]) => {
    const counts = new Array(bins).fill(0);
    for (const row of part) counts[Math.min(bins - 1, Math.floor(((row.tokens - 1) * bins) / most))] += 1 / Math.max(1, part.length);
    return counts;
  });
  const surface = svg("svg", { role: "img", "aria-label": `${spec.title}: first third of the steps against the last third` });
  const legend = el("div", { class: "legend" }, parts.map(([name, part], i) => el("span", {}, key(colour(i)), `${name} `, el("b", {}, `${part.length} samples`))));
  drawings.push([surface, () => {
    const width = Math.max(200, surface.clientWidth), height = 172, left = 42, right = width - 8, bottom = height - 22, high = Math.max(...shares.flat()) * 1.06;
    surface.setAttribute("viewBox", `0 0 ${width} ${height}`);
    surface.replaceChildren();
    const yTicks = ticks(0, high, 4);
    const y = (value) => bottom - (bottom - 8) * value / high;
    for (const t of yTicks) surface.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) }), svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, tickText(t, yTicks, true)));
    const wide = (right - left) / bins;
    shares.forEach((part, i) => part.forEach((share, bin) => { if (share > 0) surface.append(svg("rect", { x: left + bin * wide + 1 + i * (wide - 2) / 2, y: y(share), width: (wide - 2) / 2 - 0.5, height: bottom - y(share), rx: 1, fill: colour(i) })); }));
    const xTicks = ticks(0, most, 5);
    for (const t of xTicks) surface.append(svg("text", { x: left + (right - left) * t / most, y: height - 5, "text-anchor": t > 0.95 * most ? "end" : "middle" }, tickText(t, xTicks, false)));
  }]);
  return el("figure", { class: "chart" }, el("figcaption", {}, el("span", { class: "name" }, spec.title), el("span", { class: "at" }, spec.unit)), legend, surface);
}
// Confidence of the reward model against the share right, on held-out pairs.
function reliability(run) {
  if (data.runs.length > 1 || !run.reliability.length) return null;
  const bins = run.reliability, most = Math.max(...bins.map((bin) => bin[2]));
  const surface = svg("svg", { role: "img", "aria-label": `Reliability: ${bins.map((b) => `confidence ${number(b[0], true)}, right ${number(b[1], true)}`).join("; ")}` });
  drawings.push([surface, () => {
    const width = Math.max(200, surface.clientWidth), height = 172, left = 42, right = width - 12, bottom = height - 22, top = 10;
    const lowest = Math.min(0.5, ...bins.map((bin) => bin[1])), x = (v) => left + (right - left) * (v - 0.5) / 0.5, y = (v) => bottom - (bottom - top) * (v - lowest) / (1 - lowest);
    surface.setAttribute("viewBox", `0 0 ${width} ${height}`);
    surface.replaceChildren();
    const yTicks = ticks(lowest, 1, 4), xTicks = ticks(0.5, 1, 5);
    for (const t of yTicks) surface.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) }), svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, tickText(t, yTicks, true)));
    for (const t of xTicks) surface.append(svg("text", { x: x(t), y: height - 5, "text-anchor": t > 0.99 ? "end" : "middle" }, tickText(t, xTicks, true)));
    surface.append(svg("line", { class: "bound", x1: x(0.5), x2: x(1), y1: y(0.5), y2: y(1) }));
    for (const [sure, right_, count] of bins) surface.append(svg("circle", { cx: x(sure), cy: y(right_), r: 2.5 + 6 * Math.sqrt(count / most), fill: colour(0), opacity: 0.75 }));
  }]);
  return el("figure", { class: "chart" }, el("figcaption", {}, el("span", { class: "name" }, "Reliability"), el("span", { class: "at" }, "share right by confidence")), el("div", { class: "legend" }, el("span", {}, key(colour(0)), "held-out pairs, by size"), el("span", {}, "dashed: calibrated")), surface);
}
let drawings = [];
function drawAll() { for (const [, draw] of drawings) draw(); }

// Sections

function headline() {
  if (data.runs.length > 1) return comparison();
  const run = data.runs[0], tiles = [], sft = run.measured.filter((m) => m.stage === "sft");
  const rank = { agrpo: 0, reward: 1, sft: 2 };
  for (const m of [...run.measured].sort((a, b) => rank[a.stage] - rank[b.stage])) {
    if (m.stage === "sft" && run.measured.some((other) => other.stage === "agrpo")) continue;
    const before = m.stage === "agrpo" && sft.find((other) => other.what === m.what);
    const change = before ? `${m.value >= before.value ? "+" : "−"}${Math.abs(100 * (m.value - before.value)).toFixed(1)} points on SFT` : m.interval ? `${number(m.interval[0], true)} to ${number(m.interval[1], true)}` : TITLES[m.stage];
    tiles.push(tile(m.stage === "reward" ? "reward model pairs" : m.stage === "sft" && run.stages.agrpo ? `SFT ${m.what}` : m.what, number(m.value, true), change));
  }
  const stage = Object.keys(run.stages)[0], shown = run.stages[stage];
  const recent = (name) => shown.series[name] && smoothed(shown.series[name][1]).at(-1);
  if (stage === "agrpo") {
    const points = (shown.series.reward || [0, []])[1], width = Math.round((widthOf(points) * shown.step) / Math.max(1, points.length)), when = width > 1 ? `mean of ${width} steps` : `step ${shown.step}`;
    tiles.push(tile("reward", number(recent("reward")), when));
    tiles.push(tile("symmetric KL", number(recent("agrpo/kl_symmetric")), "nats a token"));
  }
  const stages = Object.keys(run.stages).length;
  tiles.push(tile("time", duration(Object.values(run.stages).reduce((sum, s) => sum + s.seconds, 0)), stages > 1 ? `of ${stages} stages` : TITLES[stage]));
  return el("div", { class: "tiles" }, tiles);
}
function tile(what, value, more) {
  return el("div", { class: "tile" }, el("div", { class: "what" }, what), el("div", { class: "value" }, value), el("div", { class: "more" }, more || ""));
}
function comparison() {
  const columns = [...new Map(data.runs.flatMap((run) => run.measured).map((m) => [`${m.stage} ${m.what}`, m])).values()];
  const several = new Set(columns.map((m) => m.stage)).size > 1;
  const name = (m) => (several ? `${TITLES[m.stage]} ${m.what}` : m.what);
  const value = (run, m) => (run.measured.find((other) => other.stage === m.stage && other.what === m.what) || {}).value;
  const rows = families().flatMap(([family, runs], i) => {
    const title = (text, strong) => el("td", { class: "name-of-run" }, runs.length > 1 && !strong ? null : key(colour(i)), strong ? el("strong", {}, text) : text);
    const own = runs.map((run) => el("tr", {}, title(run.name, false), columns.map((m) => el("td", { class: "number" }, number(value(run, m), true)))));
    if (runs.length === 1) return own;
    const mean = el("tr", {}, title(`${family}, ${runs.length} runs`, true), columns.map((m) => {
      const all = runs.map((run) => value(run, m)).filter((v) => v !== undefined);
      if (!all.length) return el("td", { class: "number" }, "–");
      const middle = all.reduce((a, b) => a + b, 0) / all.length, spread = all.length > 1 ? Math.sqrt(all.reduce((s, v) => s + (v - middle) ** 2, 0) / (all.length - 1)) : 0;
      return el("td", { class: "number" }, el("strong", {}, all.length > 1 ? `${number(middle, true)} ± ${(100 * spread).toFixed(1)}` : number(middle, true)));
    }));
    return [mean, ...own];
  });
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "run"), columns.map((m) => el("th", { class: "number", scope: "col" }, name(m))))), el("tbody", {}, rows)));
}
// One entry for what is the same finding in several runs: the numbers of each, and the advice once.
function findings() {
  const order = ["problem", "warning", "note"], entries = new Map(), stages = data.runs.some((run) => Object.keys(run.stages).length > 1);
  for (const run of data.runs) for (const [stage, shown] of Object.entries(run.stages)) for (const found of shown.findings) {
    const name = `${order.indexOf(found.severity)} ${stage} ${found.key}`, text = found.text[0].toUpperCase() + found.text.slice(1);
    const before = [data.runs.length > 1 ? run.name : "", stages ? TITLES[stage] : ""].filter(Boolean).join(", ");
    if (!entries.has(name)) entries.set(name, { found, lines: [] });
    entries.get(name).lines.push(before ? `${before}: ${found.text}.` : `${text}.`);
  }
  const list = [...entries].sort(([a], [b]) => a[0] - b[0]).map(([, { found, lines }]) => el("li", { class: found.severity }, el("span", { class: "severity" }, found.severity[0].toUpperCase() + found.severity.slice(1)), el("span", { class: "text" }, lines.map((line) => el("span", { class: "of-run" }, line))), el("span", { class: "advice" }, `${found.advice}.`)));
  return section("findings", "Findings", list.length ? el("ul", { class: "findings" }, list) : el("p", { class: "quiet" }, "Nothing unusual was found in the numbers."));
}
function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), children);
}
function stageSection(stage) {
  const runs = data.runs.filter((run) => run.stages[stage]);
  if (!runs.length) return null;
  const groups = CHARTS[stage].map(([title, specs]) => {
    const list = specs === "components" ? components(runs, stage) : specs;
    const figures = list.map((spec) => spec.histogram ? histogram(spec) : chart(spec, stage)).filter(Boolean);
    if (stage === "reward") figures.push(...[reliability(runs[0])].filter(Boolean));
    return figures.length ? [title ? el("h3", {}, title) : el("h3", {}, "Curves over the steps"), el("div", { class: figures.length % 3 === 1 && figures.length > 1 ? "charts four" : "charts" }, figures)] : [];
  });
  const told = runs.length === 1 ? `${runs[0].stages[stage].step} of ${runs[0].stages[stage].total} steps, ${duration(runs[0].stages[stage].seconds)}` : `${runs.length} runs${data.runs.some((r) => r.family !== r.name) ? "; a band spans the seeds of a family, the line is their mean" : ""}`;
  return section(`stage-${stage}`, TITLES[stage], el("div", { class: "quiet" }, told), groups);
}
function components(runs, stage) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.stages[stage].series)))].filter((name) => /^rewards\/.+\/mean$/.test(name));
  const specs = names.map((name) => ({ title: name.slice(8, -5), unit: "mean of a step", smooth: true, lines: [[name, "mean"]] }));
  specs.push({ title: "Reward deviation", unit: "in a step", smooth: true, lines: [["reward_std", "deviation"]] });
  return specs;
}

// Samples

const COLUMNS = [["run", "Run", "run"], ["step", "Step", "step number"], ["prompt", "Prompt", "prompt cut mono"], ["completion", "Completion", "completion cut mono"], ["reward", "Reward", "score number"], ["advantage", "Advantage", "score number"], ["tokens", "Tokens", "tokens number"]];
let shownRows = [];
function allSamples() {
  return data.runs.flatMap((run) => run.samples.map((row) => ({ ...row, run: run.name })));
}
function chosen() {
  const words = view.text.toLowerCase(), least = parseFloat(view.least), most = parseFloat(view.most);
  const keep = (row) => (!words || row.prompt.toLowerCase().includes(words) || row.completion.toLowerCase().includes(words)) &&
    (Number.isNaN(least) || (row.reward !== null && row.reward >= least)) && (Number.isNaN(most) || (row.reward !== null && row.reward <= most)) &&
    (view.advantage === "all" || (view.advantage === "up" ? row.advantage > 0 : view.advantage === "down" ? row.advantage < 0 : row.advantage === 0)) &&
    (view.run === "all" || row.run === view.run);
  const sign = view.down ? -1 : 1;
  return allSamples().map((row, i) => [row, i]).filter(([row]) => keep(row)).sort(([a, i], [b, j]) => {
    const x = a[view.sort], y = b[view.sort];
    if (x === y) return i - j;
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  }).map(([row]) => row);
}
function samplesSection() {
  if (!allSamples().length) return null;
  const several = data.runs.length > 1, columns = COLUMNS.filter(([name]) => several || name !== "run");
  const body = el("tbody"), count = el("span", { class: "quiet count", role: "status" });
  const more = el("button", { type: "button", class: "more-rows", onclick: () => { view.rows += PAGE_ROWS; rows(); } }, "Show more");
  const byHand = el("select", { onchange: (event) => { const [name, way] = event.target.value.split(" "); view.sort = name; view.down = way === "down"; rows(); } }, columns.flatMap(([name, title]) => [["down", "↓"], ["up", "↑"]].map(([way, arrow]) => el("option", { value: `${name} ${way}` }, `${title} ${arrow}`))));
  const heads = columns.map(([name, title, kind]) => el("th", { class: kind.replace("cut mono", ""), scope: "col" }, el("button", { type: "button", onclick: () => { view.down = view.sort === name ? !view.down : !["prompt", "completion", "run"].includes(name); view.sort = name; rows(); } }, title)));
  const input = (label, name, attributes) => el("label", {}, label, el("input", { ...attributes, value: view[name], oninput: (event) => { view[name] = event.target.value; view.rows = PAGE_ROWS; rows(); } }));
  const choice = (label, name, options) => {
    const select = el("select", { onchange: (event) => { view[name] = event.target.value; view.rows = PAGE_ROWS; rows(); } }, options.map(([value, text]) => el("option", { value, selected: value === view[name] }, text)));
    return el("label", {}, label, select);
  };
  function rows() {
    shownRows = chosen();
    heads.forEach((head, i) => head.setAttribute("aria-sort", columns[i][0] !== view.sort ? "none" : view.down ? "descending" : "ascending"));
    byHand.value = `${view.sort} ${view.down ? "down" : "up"}`;
    count.textContent = `${shownRows.length.toLocaleString("en")} of ${allSamples().length.toLocaleString("en")} samples`;
    more.hidden = shownRows.length <= view.rows;
    body.replaceChildren(...shownRows.slice(0, view.rows).map((row, i) => el("tr", { tabindex: i ? "-1" : "0", "aria-label": `Sample of step ${row.step}, reward ${number(row.reward)}: open`, onclick: () => openSample(i) }, columns.map(([name, title, kind]) => el("td", { class: kind, "data-label": title.toLowerCase() }, kind.includes("number") ? (name === "step" || name === "tokens" ? String(row[name] ?? "–") : number(row[name])) : row[name] === "" ? el("span", { class: "quiet" }, "nothing") : row[name].replace(/\s+/g, " ").slice(0, 400))))));
  }
  body.addEventListener("keydown", (event) => {
    const list = [...body.children], i = list.indexOf(event.target);
    if (i < 0) return;
    const to = { ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: list.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openSample(i); }
    else if (to !== undefined) { event.preventDefault(); focusRow(body, to); }
  });
  rows();
  return section("samples", "Samples", el("div", { class: "filters" },
    input("Prompt or completion has", "text", { type: "search", autocomplete: "off" }), input("Reward at least", "least", { type: "number", step: "any" }), input("at most", "most", { type: "number", step: "any" }),
    choice("Advantage", "advantage", [["all", "any"], ["up", "above 0"], ["down", "below 0"], ["zero", "0"]]),
    several ? choice("Run", "run", [["all", "all"], ...data.runs.map((run) => [run.name, run.name])]) : null, el("label", { class: "narrow" }, "Sort by", byHand), count),
  el("table", { class: "samples" }, el("thead", {}, el("tr", {}, heads)), body), more);
}
function focusRow(body, i) {
  const row = body.children[i];
  if (!row) return;
  for (const other of body.children) other.tabIndex = -1;
  row.tabIndex = 0;
  row.focus();
}
const MODES = { log_ratio: ["log-ratio to the reference", "less likely than the reference", "more likely"], logp: ["log-probability", "surprising", ""], advantages: ["advantage of each token", "below 0", "above 0"] };
function shade(mode, value, scale) {
  if (value === null || value === undefined) return "transparent";
  const share = Math.min(1, Math.abs(value) / scale);
  const hue = mode === "logp" ? "var(--c1)" : value > 0 ? "var(--c0)" : "var(--c1)";
  return `color-mix(in srgb, ${hue} ${(64 * share).toFixed(0)}%, transparent)`;
}
function openSample(i) {
  const row = shownRows[i], dialog = document.getElementById("sample"), table = document.querySelector(".samples tbody");
  const modes = Object.keys(MODES).filter((mode) => row[mode] && row[mode].length);
  if (modes.length && !modes.includes(view.colour)) view.colour = modes[0];
  const text = el("p", { class: "text-box tokens-text", tabindex: "0", "aria-label": "Completion" }), scale = el("div", { class: "scale" }), readout = el("p", { class: "readout quiet" });
  const flip = (by) => { if (shownRows[i + by]) openSample(i + by); };
  function colourTokens() {
    const mode = view.colour, most = Math.max(...row[mode].map((v) => Math.abs(v ?? 0))), full = mode === "log_ratio" ? Math.max(0.5, Math.min(3, most)) : mode === "logp" ? Math.max(1, Math.min(5, most)) : most || 1;
    const rest = row.tokens > row.pieces.length ? ` … (${row.tokens - row.pieces.length} more tokens)` : "";
    text.replaceChildren(...row.pieces.map((piece, k) => {
      const told = modes.map((m) => `${MODES[m][0]} ${row[m][k] > 0 && m !== "logp" ? "+" : ""}${number(row[m][k])}`).join(", ");
      const token = el("span", { class: "token", title: told, onpointerenter: () => { readout.textContent = `token ${k + 1}: ${told}`; } }, piece);
      token.style.backgroundColor = shade(mode, row[mode][k], full);
      return token;
    }), rest);
    const steps = mode === "logp" ? [0, -0.25, -0.5, -0.75, -1] : [-1, -0.5, 0, 0.5, 1];
    const ramp = el("span", { class: "ramp", "aria-hidden": "true" }, steps.map((s) => { const cell = el("i"); cell.style.backgroundColor = shade(mode, s * full, full); return cell; }));
    const ends = steps.map((s) => s * full), sign = (v) => (v > 0 ? "+" : "") + number(v);
    const options = modes.map((m) => el("option", { value: m, selected: m === mode }, MODES[m][0]));
    scale.replaceChildren(el("label", { class: "quiet" }, "Colour: ", el("select", { onchange: (event) => { view.colour = event.target.value; colourTokens(); } }, options)), el("span", { class: "quiet number ends" }, sign(ends[0]), ramp, sign(ends.at(-1))));
  }
  if (modes.length && row.pieces && row.pieces.length) colourTokens(); else text.textContent = row.completion;
  readout.textContent = modes.length ? "Point at a token for its numbers." : "";
  const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  const close = () => dialog.close();
  dialog.replaceChildren(
    el("div", { class: "bar" }, el("h2", { id: "sample-title" }, `Step ${row.step}, sample ${i + 1} of ${shownRows.length}`), el("button", { type: "button", "aria-label": "Previous sample", disabled: i === 0, onclick: () => flip(-1) }, "←"), el("button", { type: "button", "aria-label": "Next sample", disabled: i + 1 >= shownRows.length, onclick: () => flip(1) }, "→"), el("button", { type: "button", onclick: close }, "Close")),
    el("dl", { class: "facts" }, fact("reward", number(row.reward)), fact("advantage", number(row.advantage)), fact("tokens", String(row.tokens ?? "–")), data.runs.length > 1 ? fact("run", row.run) : null, Object.keys(row.rewards).length > 1 ? Object.entries(row.rewards).map(([name, value]) => fact(name, number(value))) : null),
    el("h3", {}, "Prompt"), el("p", { class: "text-box mono", tabindex: "0", "aria-label": "Prompt" }, row.prompt), el("h3", {}, "Completion"), scale, text, readout);
  dialog.onkeydown = (event) => {
    if (event.target.tagName === "SELECT") return;
    if (event.key === "ArrowLeft") flip(-1); else if (event.key === "ArrowRight") flip(1);
  };
  dialog.onclose = () => { if (i >= view.rows) document.querySelector(".more-rows")?.focus(); else if (table.isConnected) focusRow(table, i); };
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function configuration() {
  const parts = data.runs.flatMap((run) => Object.entries(run.stages).filter(([, shown]) => shown.config).map(([stage, shown], i) => el("details", { open: data.runs.length === 1 && i === 0 }, el("summary", {}, `${data.runs.length > 1 ? `${run.name}: ` : ""}${TITLES[stage]}`), el("h3", {}, "Run it again, where it ran"), el("pre", { class: "command", tabindex: "0" }, shown.reproduce), el("h3", {}, "Resolved configuration, with the versions that ran it"), el("pre", { tabindex: "0" }, shown.config))));
  return parts.length ? section("configuration", "Configuration", parts) : null;
}

function render() {
  drawings = [];
  const single = data.runs.length === 1;
  const title = single ? data.runs[0].name : `${data.runs.length} runs compared`;
  document.title = `${title}: agrpo report`;
  document.getElementById("title").textContent = title;
  document.getElementById("verdict").textContent = single ? data.runs[0].verdict : `${families().map(([name, runs]) => runs.length > 1 ? `${name} (${runs.length} runs)` : name).join(", ")}. Runs whose names differ in their seed alone are taken together.`;
  document.getElementById("headline").replaceChildren(headline());
  const sections = [findings(), ...["agrpo", "reward", "sft"].map(stageSection), samplesSection(), configuration()].filter(Boolean);
  document.getElementById("main").replaceChildren(...sections, el("footer", {}, "Written by agrpo from the run's own files. docs/report.md says how to read it."));
  document.getElementById("contents").replaceChildren(el("ul", {}, sections.map((part) => el("li", {}, el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)))));
  drawAll();
}
function theme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Change to the ${dark() ? "light" : "dark"} theme`); };
  try { const kept = localStorage.getItem("agrpo-theme"); if (kept === "light" || kept === "dark") root.dataset.theme = kept; } catch { /* no storage for files: the choice lasts as long as the page */ }
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("agrpo-theme", root.dataset.theme); } catch { /* as above */ }
    name();
  });
  name();
}
async function follow() {
  const told = document.getElementById("live");
  try {
    const answer = await fetch(`data.json${location.search}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const text = await answer.text();
    if (text !== follow.seen && !document.getElementById("sample").open && !["INPUT", "SELECT"].includes(document.activeElement.tagName)) {
      const first = follow.seen === undefined;
      follow.seen = text;
      if (!first || text !== document.getElementById("data").textContent) { data = JSON.parse(text); render(); }
    }
    told.textContent = "live";
  } catch { told.textContent = "the server does not answer"; }
  setTimeout(follow, 5000);
}
theme();
render();
let width = document.body.clientWidth;
new ResizeObserver(() => { if (document.body.clientWidth !== width) { width = document.body.clientWidth; drawAll(); } }).observe(document.body);
if (document.documentElement.dataset.live !== undefined) follow();
