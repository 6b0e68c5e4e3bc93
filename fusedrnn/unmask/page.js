"use strict";

// --- The model ---------------------------------------------------------------------------------

const facts = JSON.parse(document.getElementById("model").textContent);
const characters = facts.characters;
const weights = {};
for (const [name, text] of Object.entries(facts.weights)) {
  weights[name] = new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}
const V = characters.length; // different characters
const H = weights["l_hidden.bias"].length; // hidden units
const N = weights["e.weight"].length / V; // numbers of an embedding

/** weight @ x + bias */
function linear(layer, x) {
  const weight = weights[layer + ".weight"];
  return Float64Array.from(weights[layer + ".bias"], (bias, i) =>
    x.reduce((sum, value, j) => sum + weight[i * x.length + j] * value, bias));
}

/** weight.T @ g: the gradient of the input of a linear layer, from the gradient of its output */
function transposed(layer, g) {
  const weight = weights[layer + ".weight"];
  const columns = weight.length / g.length;
  return Float64Array.from({ length: columns }, (_, j) =>
    g.reduce((sum, value, i) => sum + weight[i * columns + j] * value, 0));
}

function logSoftmax(x) {
  const most = Math.max(...x);
  const log = most + Math.log(x.reduce((sum, value) => sum + Math.exp(value - most), 0));
  return x.map((value) => value - log);
}

/** Every value of the forward pass, for each of the characters (given by their numbers). */
function forward(numbers) {
  const steps = [];
  let hp = new Float64Array(H);
  for (const c of numbers) {
    const e = Float64Array.from(weights["e.weight"].subarray(c * N, (c + 1) * N));
    const a = linear("l_in", e);
    const v = a.map((x) => Math.max(0, x));
    const s = v.map((x, i) => x + hp[i]);
    const z = linear("l_hidden", s);
    const h = z.map(Math.tanh);
    const logp = logSoftmax(linear("l_out", h));
    steps.push({ c, e, a, v, hp, s, z, h, logp });
    hp = h;
  }
  return steps;
}

/**
 * The gradients of L = -log p(target) after step t, with respect to every value of steps t to 0.
 * Index k of the result belongs to step k; `o` is the input of softmax.
 */
function backward(steps, t, target) {
  const gradients = [];
  const o = steps[t].logp.map(Math.exp);
  o[target] -= 1;
  let h = transposed("l_out", o);
  for (let k = t; k >= 0; k--) {
    const z = h.map((g, i) => g * (1 - steps[k].h[i] ** 2));
    const s = transposed("l_hidden", z);
    const a = s.map((g, i) => (steps[k].a[i] > 0 ? g : 0));
    gradients[k] = { h, z, s, v: s, hp: s, a, e: transposed("l_in", a) };
    h = s;
  }
  gradients[t].o = o;
  return gradients;
}

const norm = (x) => Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));

// --- Words and numbers -------------------------------------------------------------------------

const NAMES = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const SPOKEN = { " ": "space", "\n": "line break", "\t": "tab" };
const glyph = (c) => NAMES[characters[c]] ?? characters[c];
const spoken = (c) => SPOKEN[characters[c]] ?? characters[c];
const quoted = (c) => `‘${glyph(c)}’`;
const subscript = (n) => String(n).replace(/\d/g, (digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]);
const percent = (p) => (p < 0.01 ? "<1%" : `${Math.round(100 * p)}%`);
const raised = (n) => String(n).replace(/./g, (c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻");

function number(x) {
  const size = Math.abs(x);
  if (size === 0 || (size >= 0.01 && size < 1000)) return x.toFixed(2).replace("-", "−");
  const [digits, exponent] = x.toExponential(1).split("e");
  return `${digits.replace("-", "−")}·10${raised(Number(exponent))}`;
}

/** Set a text, with the names of layers in the font of code. */
function write(element, text) {
  element.replaceChildren(...text.split(/\b(l_\w+)/).map((part, i) => {
    if (i % 2 === 0) return part;
    const code = document.createElement("code");
    code.textContent = part;
    return code;
  }));
}

/** The numbers of the characters, the likeliest first. */
const ranked = (logp) => [...logp.keys()].sort((i, j) => logp[j] - logp[i]);

// The operations of a step, in order, with the parts of the diagram that belong to each.
const OPERATIONS = {
  forward: [
    ["character", "c"], ["embedding", "e"], ["l_in", "l_in", "a"], ["relu", "v"], ["addition", "s"],
    ["l_hidden", "l_hidden", "z"], ["tanh", "tanh", "h"], ["prediction", "l_out", "p"],
  ],
  backward: [
    ["loss", "p"], ["state", "l_out", "h"], ["tanh", "tanh", "z"], ["l_hidden", "l_hidden", "s"],
    ["addition", "v", "hp"], ["relu", "a"], ["l_in", "l_in", "e"],
  ],
};

/** The operation that computes a part of the diagram; 0 for what is known before. */
const computedAt = (part) =>
  Math.max(0, OPERATIONS[view].findIndex(([, ...parts]) => parts.includes(part)));

/** Title, equation and explanation of an operation of step k. */
function explain(k, stage) {
  const step = steps[k];
  const [h, before] = [`h${subscript(k + 1)}`, `h${subscript(k)}`];
  if (view === "forward") {
    const following = steps[k + 1]?.c;
    const best = ranked(step.logp)[0];
    const saturated = step.h.filter((x) => Math.abs(x) > 0.9).length;
    return [
      ["A character", `c = ${quoted(step.c)}`,
        `The network reads one character at a time. In its list of ${V} characters, this is number ${step.c}.`],
      ["Its embedding", `e = e.weight[${step.c}]`,
        `A table holds ${N} numbers for each character. ` +
        "They were learned in training, like all weights here."],
      ["The first linear layer, l_in", "a = W e + b",
        `Each of the ${H} units multiplies the ${N} numbers by weights of its own and adds them up.`],
      ["relu", "v = max(0, a)",
        `Negative numbers become 0. Here, ${step.v.filter((x) => x > 0).length} of ${H} units are above 0.`],
      ["The addition", `s = ${before} + v`,
        `The hidden state ${before} depends on everything read so far. ` +
        "Adding it to the new input is what makes the network recurrent."],
      ["The second linear layer, l_hidden", "z = W s + b",
        `Each unit multiplies all ${H} numbers by its own weights. Every step uses the same matrix.`],
      ["tanh", `${h} = tanh(z)`,
        "tanh keeps each number between −1 and 1. The result is the new hidden state: it goes to " +
        `the next step and to the output. Here, ${saturated} of ${H} units are beyond ±0.9.`],
      ["The prediction", `p = softmax(W ${h} + b)`,
        `A last linear layer, l_out, gives each of the ${V} characters a score, ` +
        "and softmax turns the scores into probabilities. " +
        (following === undefined
          ? `The likeliest next character is ${quoted(best)}.`
          : `The text goes on with ${quoted(following)}: the network gave it ${percent(Math.exp(step.logp[following]))}.`)],
    ][stage];
  }
  const g = gradients[k];
  const share = norm(g.h) > 0 ? norm(g.z) / norm(g.h) : 0;
  return [
    ["The loss", `L = −log p(${quoted(loss.target)}) = ${number(-step.logp[loss.target])}`,
      `The gradient of L with respect to the scores is p, minus 1 at ${quoted(loss.target)}. ` +
      "Training moves the scores the other way: that one up, the others down."],
    k === loss.step
      ? ["Back through l_out", `∂L/∂${h} = Wᵀ ∂L/∂scores`,
        "The transposed matrix of l_out takes the gradient from the scores to the hidden state."]
      : ["From the next step", `∂L/∂${h} = ${number(norm(g.h))} in norm`,
        `This is the gradient that the addition of step ${k + 2} passed back. ` +
        `The prediction depends on ${h} only through that step.`],
    ["Back through tanh", `∂L/∂z = ∂L/∂${h} · (1 − ${h}²)`,
      "1 − h² is the slope of tanh. It is near 0 where h is near ±1, and never above 1. " +
      `Here, ${percent(share)} of the norm is left.`],
    ["Back through l_hidden", "∂L/∂s = Wᵀ ∂L/∂z",
      "Each step multiplies by the same matrix, transposed, and by a slope of tanh. Over many steps, " +
      "the product tends to vanish or to explode. Each step also adds ∂L/∂z sᵀ to the gradient of W."],
    ["Back through the addition", `∂L/∂${before} = ∂L/∂v = ∂L/∂s`,
      "An addition passes its gradient unchanged to both sides: " +
      `to the input v, and to the state ${before} of the step before.`],
    ["Back through relu", "∂L/∂a = ∂L/∂v where a > 0, else 0",
      "Only units that relu let through have a gradient."],
    ["Back through l_in", "∂L/∂e = Wᵀ ∂L/∂a",
      `Its norm, ${number(norm(g.e))}, measures how much the loss changes with this ${quoted(step.c)}.` +
      (k ? ` The gradient goes on to step ${k}.` : " This is the first step: the gradient ends here.")],
  ][stage];
}

// --- Colours -----------------------------------------------------------------------------------

const darkness = matchMedia("(prefers-color-scheme: dark)");
let palette; // [negative, zero, positive], each [r, g, b]

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  palette = ["--negative", "--zero", "--positive"].map((name) =>
    style.getPropertyValue(name).trim().match(/\w\w/g).map((hex) => parseInt(hex, 16)));
}

/** The colour of x. At x = ±scale, four fifths of the way to the full colour. */
function colour(x, scale) {
  const share = scale > 0 ? 1 - Math.exp((-1.6 * Math.abs(x)) / scale) : 0;
  return palette[1].map((zero, i) => zero + share * (palette[x < 0 ? 0 : 2][i] - zero));
}

const css = (x, scale) => `rgb(${colour(x, scale).map(Math.round)})`;

/** Draw a matrix, one pixel a number. */
function pixels(canvas, values, columns, scale) {
  canvas.width = columns;
  canvas.height = Math.ceil(values.length / columns);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  values.forEach((x, i) => image.data.set([...colour(x, scale), 255], 4 * i));
  context.putImageData(image, 0, 0);
}

function picture(layer, columns) {
  const canvas = document.createElement("canvas");
  const weight = weights[layer + ".weight"];
  pixels(canvas, weight, columns, 2 * norm(weight) / Math.sqrt(weight.length));
  return canvas.toDataURL();
}

const side = (length) => Math.ceil(Math.sqrt(length));

// --- State -------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
let steps = []; // what `forward` returns
let gradients = []; // what `backward` returns
let loss = { step: 0, target: 0 }; // the prediction whose gradient is shown
let view = "forward";
let frames = { forward: [], backward: [] }; // [step, operation] of each position of the slider
let place = { forward: 0, backward: 0 }; // the positions
let unit = 0; // the unit that is followed
let timer = null;

/** Read a text, and go to its end or its start. */
function read(text, atEnd) {
  const all = Array.from(text);
  const unknown = [...new Set(all.filter((c) => !characters.includes(c)))];
  $("unknown").textContent = unknown.length
    ? `Not in the text that the model was trained on, and therefore left out: ${unknown.join(" ")}`
    : all.length ? "" : "Type a text or choose an example.";
  steps = forward(all.map((c) => characters.indexOf(c)).filter((c) => c >= 0));
  frames.forward = steps.flatMap((_, k) => OPERATIONS.forward.map((_, stage) => [k, stage]));
  place.forward = atEnd ? Math.max(frames.forward.length - 1, 0) : 0;
  document.body.classList.toggle("empty", !steps.length);
  buildRow();
  $("loss-step").replaceChildren(...steps.map(({ c }, k) => new Option(`${k + 1}: ${glyph(c)}`, k)));
  if (steps.length) choose(Math.max(steps.length - 2, 0));
}

/** Choose the prediction whose gradient is shown; by default, that of the character that follows. */
function choose(step, target = steps[step + 1]?.c ?? ranked(steps[step].logp)[0]) {
  loss = { step, target };
  gradients = backward(steps, step, target);
  frames.backward = [[step, 0]];
  for (let k = step; k >= 0; k--) {
    for (let stage = 1; stage < OPERATIONS.backward.length; stage++) frames.backward.push([k, stage]);
  }
  place.backward = 0;
  $("loss-step").value = step;
  $("loss-target").value = target;
  show();
}

function go(position) {
  const last = frames[view].length - 1;
  place[view] = Math.min(Math.max(position, 0), last);
  if (place[view] === last) pause();
  show();
}

/** Go to the end of a step: of this one, else of the next one or the one before. */
function goSteps(direction) {
  const ends = frames[view].flatMap(([k], i, all) => (all[i + 1]?.[0] === k ? [] : [i]));
  const here = place[view];
  go(direction > 0 ? ends.find((i) => i > here) ?? here : ends.reverse().find((i) => i < here) ?? 0);
}

function pause() {
  clearInterval(timer);
  timer = null;
  $("play").textContent = "Play";
}

function play() {
  if (timer) return pause();
  $("play").textContent = "Pause";
  timer = setInterval(() => go(place[view] + 1), 600);
  go(place[view] === frames[view].length - 1 ? 0 : place[view] + 1);
}

function follow(i) {
  unit = i;
  $("unit").value = i + 1;
  show();
}

// --- The row of cells --------------------------------------------------------------------------

function buildRow() {
  const inside = `<span class="over" aria-hidden="true"><b></b><span></span></span><canvas></canvas>
    <span class="char" aria-hidden="true"></span><span class="unseen"></span>`;
  const start = document.createElement("li");
  start.className = "known";
  start.innerHTML = `<div class="box">${inside}</div>`;
  start.querySelector(".over span").textContent = "h₀ = 0";
  start.querySelector(".unseen").textContent = "The first state, zeros";
  const cells = steps.map((step, k) => {
    const item = document.createElement("li");
    item.innerHTML = `<button type="button" class="box">${inside}</button>`;
    item.querySelector(".char").textContent = glyph(step.c);
    item.firstChild.addEventListener("click", () => {
      pause();
      const stage = view === "forward" ? OPERATIONS.forward.length - 1 : 1;
      go(frames[view].findIndex((frame) => frame[0] === k && frame[1] === stage));
    });
    return item;
  });
  $("row").replaceChildren(start, ...cells);
}

function showRow(now, stage) {
  const back = view === "backward";
  const scale = back ? peak(gradients[loss.step]) : 1;
  const [start, ...items] = $("row").children;
  pixels(start.querySelector("canvas"), new Float64Array(H), side(H), 1);
  const focused = $("row").contains(document.activeElement);
  items.forEach((item, k) => {
    const box = item.firstChild;
    const past = back ? k > now && k <= loss.step : k < now;
    const known = past || (k === now && stage >= computedAt("h"));
    const best = ranked(steps[k].logp)[0];
    let [bold, small] = ["", ""];
    if (back) small = known ? number(norm(gradients[k].h)) : k === loss.step + 1 ? "target" : "";
    else if (past || (k === now && stage >= computedAt("p"))) {
      [bold, small] = [glyph(best), percent(Math.exp(steps[k].logp[best]))];
    }
    const target = back && k === loss.step + 1 && loss.target !== steps[k].c ? loss.target : steps[k].c;
    item.querySelector(".char").textContent = glyph(target);
    item.querySelector(".over b").textContent = bold;
    item.querySelector(".over span").textContent = small;
    item.classList.toggle("known", known);
    item.classList.toggle("right", Boolean(bold) && best === steps[k + 1]?.c);
    item.classList.toggle("outside", back && k > loss.step);
    const values = back ? gradients[k]?.h : steps[k].h;
    pixels(item.querySelector("canvas"), known ? values : new Float64Array(H), side(H), scale);
    const said = !small ? "" : back ? `, gradient ${small}` : `, predicts ${spoken(best)}, ${small}`;
    item.querySelector(".unseen").textContent = `Step ${k + 1}, ${spoken(steps[k].c)}${said}`;
    box.disabled = back && k > loss.step;
    box.tabIndex = k === now ? 0 : -1;
    if (k === now) box.setAttribute("aria-current", "step");
    else box.removeAttribute("aria-current");
  });
  if (focused) items[now].firstChild.focus({ preventScroll: true });
  const [row, { offsetLeft: left, offsetWidth: width }] = [$("row"), items[now]];
  if (left - 90 < row.scrollLeft || left + width + 90 > row.scrollLeft + row.clientWidth) {
    const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
    row.scrollTo({ left: left - (row.clientWidth - width) / 2, behavior });
  }
}

// --- The diagram of the cell -------------------------------------------------------------------

const TILES = { e: N, a: H, v: H, hp: H, s: H, z: H, h: H }; // vectors, and their lengths
const LAYERS = { l_in: N, l_hidden: H, l_out: H }; // matrices, and their columns

// From, to, and the operation that uses the connection: forward, backward.
const EDGES = [
  ["c", "e", 1, null], ["e", "l_in", 2, 6], ["l_in", "a", 2, 6], ["a", "v", 3, 5],
  ["v", "plus", 4, 4], ["past", "hp", 0, 4], ["hp", "plus", 4, 4], ["plus", "s", 4, 4],
  ["s", "l_hidden", 5, 3], ["l_hidden", "z", 5, 3], ["z", "tanh", 6, 2], ["tanh", "h", 6, 2],
  ["h", "l_out", 7, 1], ["l_out", "p", 7, 1], ["h", "future", 6, 1],
];

/** The size of the diagram, and its boxes: [centre x, centre y, width, height]. */
function layout(room) {
  if (room >= 860) {
    return {
      size: [1120, 392],
      c: [32, 282, 44, 44], e: [102, 282, 48, 48], l_in: [170, 282, 40, 112],
      a: [260, 282, 96, 96], v: [398, 282, 96, 96],
      hp: [260, 90, 96, 96], plus: [398, 90, 30, 30], s: [490, 90, 96, 96],
      l_hidden: [632, 90, 112, 112], z: [774, 90, 96, 96],
      tanh: [908, 90, 108, 104], h: [1040, 90, 96, 96],
      l_out: [1040, 270, 96, 112], p: [704, 270, 440, 170],
      past: [6, 90, 0, 0], future: [1120, 90, 0, 0],
    };
  }
  const width = Math.min(room, 480);
  const tile = width < 290 ? 80 : 96;
  const [left, right] = [width / 2 - tile / 2 - 28, width / 2 + tile / 2 + 28];
  return {
    size: [width, 1116],
    c: [left - 18, 62, 44, 44], e: [width / 2 - 8, 62, 48, 48], l_in: [right, 62, 40, 112],
    a: [left, 216, tile, tile], v: [right, 216, tile, tile],
    hp: [left, 376, tile, tile], plus: [width / 2, 376, 30, 30], s: [right, 376, tile, tile],
    l_hidden: [left, 536, tile, tile], z: [right, 536, tile, tile],
    tanh: [left, 696, tile, tile], h: [right, 696, tile, tile],
    l_out: [right, 850, tile, tile], p: [width / 2, 1028, width, 130],
    past: [0, 376, 0, 0], future: [width, 696, 0, 0],
  };
}

let parts = {}; // of the diagram: what `showDiagram` changes

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

/** A path between two boxes: straight if possible, else down, across and down. */
function connect([x, y, w, h], [toX, toY, toW, toH], gap) {
  if (Math.abs(y - toY) <= 20) {
    return x < toX ? `M${x + w / 2 + 5} ${y}H${toX - toW / 2 - 5}` : `M${x - w / 2 - 5} ${y}H${toX + toW / 2 + 5}`;
  }
  if (toY < y) return `M${x} ${y - h / 2 - 5}V${toY + toH / 2 + 5}`;
  const [start, end] = [y + h / 2 + gap, toY - toH / 2 - 5];
  return `M${x} ${start}V${Math.min(start + 10, (start + end) / 2)}H${toX}V${end}`;
}

function buildDiagram() {
  const room = $("diagram").clientWidth;
  const box = layout(room);
  const wide = box.size[0] > 500;
  const root = svg("svg", { role: "img" });
  root.style.maxWidth = `${box.size[0]}px`;
  parts = { room, box, root, wide, edges: [], tiles: {}, marks: {}, labels: {} };
  for (const kind of ["later", "active", "done"]) {
    const marker = svg("marker", {
      id: `arrow-${kind}`, class: `arrow ${kind}`, viewBox: "0 0 8 8", refX: 6, refY: 4,
      markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse",
    }, root);
    svg("path", { d: "M0 0L8 4L0 8Z" }, marker);
  }
  for (const [from, to] of EDGES) {
    parts.edges.push(svg("path", { d: connect(box[from], box[to], wide ? 5 : 26) }, root));
  }
  const frame = (part, margin, radius) => {
    const [x, y, w, h] = box[part];
    const group = svg("g", { class: "part", "data-part": part }, root);
    svg("rect", {
      class: "frame", x: x - w / 2 - margin, y: y - h / 2 - margin, rx: radius,
      width: w + 2 * margin, height: h + 2 * margin,
    }, group);
    return group;
  };
  parts.glyph = svg("text", { class: "glyph", x: box.c[0], y: box.c[1] }, frame("c", 0, 10));
  for (const [part, length] of Object.entries(TILES)) {
    const group = frame(part, 4, 7);
    const [x, y, size] = box[part];
    const pitch = size / side(length);
    parts.tiles[part] = Array.from({ length }, (_, i) => svg("rect", {
      class: "number", x: x - size / 2 + pitch * (i % side(length)) + 0.5,
      y: y - size / 2 + pitch * Math.floor(i / side(length)) + 0.5,
      width: pitch - 1, height: pitch - 1, ...(length === H && { "data-unit": i }),
    }, group));
  }
  for (const [layer, columns] of Object.entries(LAYERS)) {
    const group = frame(layer, 4, 7);
    const [x, y, w, h] = box[layer];
    const href = picture(layer, columns);
    svg("image", {
      x: x - w / 2, y: y - h / 2, width: w, height: h, preserveAspectRatio: "none", href,
    }, group);
    if (layer !== "l_out") {
      parts.marks[layer] = svg("rect", { class: "mark", x: x - w / 2 - 1, width: w + 2, height: h / H + 1 }, group);
    }
  }
  parts.curve = svg("g", {}, frame("tanh", 0, 7));
  parts.bars = svg("g", { class: "part", "data-part": "p" }, root);
  const [x, y, w] = box.plus;
  svg("circle", { class: "plus", cx: x, cy: y, r: w / 2 }, root);
  svg("path", { class: "sign", d: `M${x - 6} ${y}h12M${x} ${y - 6}v12` }, root);

  for (const part of [...Object.keys(TILES), ...Object.keys(LAYERS), "tanh", "p"]) {
    const [x, y, , h] = box[part];
    const above = wide && ["hp", "s", "l_hidden", "z", "tanh", "h"].includes(part);
    const label = { x, y: above ? y - h / 2 - 13 : y + h / 2 + 20, class: part in LAYERS ? "code" : "" };
    parts.labels[part] = svg("text", label, root);
  }
  for (const [name, x, y] of [
    ["relu", (box.a[0] + box.v[0]) / 2, box.a[1] - 9],
    ["softmax", wide ? 957 : 0, box.l_out[1] - 9],
    ["past", wide ? 104 : 0, box.hp[1] - 9],
  ]) {
    parts.labels[name] = svg("text", { class: "op", x, y }, root);
  }
  root.addEventListener("pointerover", (event) => {
    if (event.target.dataset.unit) follow(Number(event.target.dataset.unit));
  });
  $("diagram").replaceChildren(root);
}

/** The scale of the colours of a step's gradients. */
const peak = (g) => Math.max(norm(g.h), norm(g.z), norm(g.s)) / Math.sqrt(H);

function showDiagram(k, stage) {
  const back = view === "backward";
  const step = steps[k];
  const values = back ? gradients[k] : step;
  const scale = back ? peak(values) : 1;
  const outside = back && k < loss.step; // l_out has no part in the steps before the prediction
  const { box, root, wide, edges, tiles, marks, labels } = parts;

  root.setAttribute("viewBox", `0 0 ${box.size[0]} ${outside && !wide ? 780 : box.size[1]}`);
  root.setAttribute("aria-label",
    `The cell at step ${k + 1}: ${back ? "gradients" : "values"} up to ${OPERATIONS[view][stage][0]}.`);
  EDGES.forEach(([from, to, ...turns], i) => {
    const turn = turns[back ? 1 : 0];
    const absent = turn === null || (outside && (to === "l_out" || to === "p")) ||
      (back && to === "future" && !outside);
    const kind = absent ? "absent" : stage < turn ? "later" : stage === turn ? "active" : "done";
    edges[i].setAttribute("class", `edge ${kind}`);
    edges[i].setAttribute(back ? "marker-start" : "marker-end", absent ? "none" : `url(#arrow-${kind})`);
    edges[i].removeAttribute(back ? "marker-end" : "marker-start");
  });
  for (const group of root.querySelectorAll(".part")) {
    const { part } = group.dataset;
    group.classList.toggle("active", OPERATIONS[view][stage].includes(part, 1));
    group.classList.toggle("absent", outside && (part === "p" || part === "l_out"));
  }
  for (const [part, squares] of Object.entries(tiles)) {
    const known = stage >= computedAt(part);
    squares.forEach((square, i) => {
      square.style.fill = known ? css(values[part][i], scale) : "";
      square.setAttribute("rx", square.width.baseVal.value * (known && values[part][i] < 0 ? 0.5 : 0.15));
      square.classList.toggle("followed", squares.length === H && i === unit);
    });
  }
  for (const [layer, mark] of Object.entries(marks)) {
    const [, y, , h] = box[layer];
    mark.setAttribute("y", y - h / 2 + (h * unit) / H - 0.5);
  }
  parts.glyph.textContent = glyph(step.c);
  showCurve(step, back, stage >= computedAt("tanh"));
  showBars(k, back, !outside && stage >= computedAt("p"));

  const [h, before] = [`h${subscript(k + 1)}`, `h${subscript(k)}`];
  const texts = back
    ? {
      e: "∂L/∂e", l_in: "l_in ᵀ", a: "∂L/∂a", v: "∂L/∂v", hp: `∂L/∂${before}`, s: "∂L/∂s",
      l_hidden: "l_hidden ᵀ", z: "∂L/∂z", tanh: "slope of tanh", h: `∂L/∂${h}`,
      l_out: outside ? "" : "l_out ᵀ", p: outside ? "" : "∂L/∂scores",
      past: k ? `to step ${k}` : "", softmax: "",
    } : {
      e: "e", l_in: "l_in", a: "a", v: "v", hp: before, s: `s = ${before} + v`,
      l_hidden: "l_hidden", z: "z", tanh: "tanh", h,
      l_out: "l_out", p: "p, the likeliest next characters",
      past: k ? `from step ${k}` : "zeros", softmax: wide ? "softmax" : "",
    };
  for (const [part, text] of Object.entries({ relu: "relu", ...texts })) labels[part].textContent = text;
  if (!wide) labels.past.textContent = "";
}

/** Draw tanh, or its slope, with a dot for each unit. */
function showCurve(step, back, known) {
  const [x, y, w, h] = parts.box.tanh;
  const [middle, bottom, reach] = [y, y + h / 2 - 10, h - 20];
  const across = (z) => x + (Math.max(-3.2, Math.min(3.2, z)) / 3.2) * (w / 2 - 8);
  const up = (z) => (back ? bottom - (1 - Math.tanh(z) ** 2) * reach : middle - (Math.tanh(z) * reach) / 2);
  const points = Array.from({ length: 65 }, (_, i) => (i - 32) / 10);
  const axes = `M${x - w / 2 + 8} ${back ? bottom : middle}h${w - 16}M${x} ${y - h / 2 + 6}v${h - 12}`;
  parts.curve.replaceChildren();
  svg("path", { class: "axis", d: axes }, parts.curve);
  svg("path", { class: "line", d: `M${points.map((z) => `${across(z)} ${up(z)}`).join("L")}` }, parts.curve);
  if (!known) return;
  step.z.forEach((z, i) => svg("circle", {
    class: i === unit ? "dot followed" : "dot", cx: across(z), cy: up(z), r: i === unit ? 4.5 : 2.5,
    style: `fill: ${css(step.h[i], 1)}`, "data-unit": i,
  }, parts.curve));
}

/** Draw the largest probabilities, or the largest gradients of the scores. */
function showBars(k, back, known) {
  const [x, y, w, h] = parts.box.p;
  const count = Math.min(V, Math.floor(w / 27));
  const pitch = w / count;
  const [top, bottom] = [y - h / 2 + 16, y + h / 2 - 20];
  const values = steps[k].logp.map((value, c) => Math.exp(value) - (back && c === loss.target ? 1 : 0));
  const order = ranked(values.map(Math.abs)).slice(0, count);
  const zero = back ? top + 0.4 * (bottom - top) : bottom;
  const length = (value) =>
    (Math.abs(value) * (value < 0 ? bottom - zero - 14 : zero - top)) / Math.max(0.3, Math.abs(values[order[0]]));
  const following = back ? loss.target : steps[k + 1]?.c;
  parts.bars.replaceChildren();
  svg("path", { class: "axis", d: `M${x - w / 2} ${zero}h${w}` }, parts.bars);
  if (!known) return;
  order.forEach((c, i) => {
    const left = x - w / 2 + i * pitch;
    const height = Math.max(1, length(values[c]));
    const below = values[c] < 0;
    const bar = svg("g", { class: c === following ? "bar following" : "bar" }, parts.bars);
    svg("rect", { x: left + 3, y: below ? zero : zero - height, width: pitch - 6, height, rx: 2 }, bar);
    svg("text", { class: "name", x: left + pitch / 2, y: bottom + 17 }, bar).textContent = glyph(c);
    if (Math.abs(values[c]) < (back ? 0.045 : 0.02)) return; // no room for small numbers
    const label = { class: "value", x: left + pitch / 2, y: below ? zero + height + 13 : zero - height - 5 };
    svg("text", label, bar).textContent = back ? number(values[c]) : percent(values[c]);
  });
}

// --- Numbers, legend, chart --------------------------------------------------------------------

function showNumbers(k, stage) {
  const [h, before] = [`h${subscript(k + 1)}`, `h${subscript(k)}`];
  const columns = {
    a: "a", v: "v = relu(a)", hp: before, s: `s = ${before} + v`, z: "z", h: `${h} = tanh(z)`,
  };
  const line = (title, values, all) => {
    const cells = Object.keys(columns).map((part) =>
      `<td>${all || stage >= computedAt(part) ? number(values[part][unit]) : "·"}</td>`);
    return `<tr><th scope="row">${title}</th>${cells.join("")}</tr>`;
  };
  $("numbers").innerHTML =
    `<tr><td></td>${Object.values(columns).map((title) => `<th scope="col">${title}</th>`).join("")}</tr>` +
    line("value", steps[k], view === "backward") +
    (view === "backward" ? line("gradient", gradients[k], false) : "");
}

function showLegend(k) {
  const end = 2 * (view === "backward" ? peak(gradients[k]) : 1);
  const stops = Array.from({ length: 41 }, (_, i) => css((i - 20) / 10, 1));
  const [low, , high] = $("legend").querySelectorAll("span");
  $("legend").querySelector(".ramp").style.background = `linear-gradient(90deg, ${stops})`;
  [low.textContent, high.textContent] = [number(-end), number(end)];
}

/** Draw the norm of the gradient of each state, from the prediction back to step `now`. */
function showChart(now, stage) {
  const sizes = gradients.map((g) => Math.max(norm(g.h), 1e-30)); // for the logarithm
  const change = sizes[loss.step] / sizes[0];
  const times = Math.max(change, 1 / change).toPrecision(2);
  $("chart-text").textContent = loss.step === 0
    ? "Choose a prediction further on in the text: this one has only one step."
    : `The norm of ∂L/∂h at each step, on a logarithmic axis. From step ${loss.step + 1} back to step 1, ` +
      `it ${change > 1 ? "shrinks" : "grows"} ${Number(times).toLocaleString("en")} times.`;
  const [width, height, left, bottom, top] = [Math.max($("chart").clientWidth, 240), 230, 54, 200, 10];
  const low = Math.floor(Math.log10(Math.min(...sizes)));
  const high = Math.max(Math.ceil(Math.log10(Math.max(...sizes))), low + 1);
  const across = (k) => left + ((k + 0.5) * (width - left)) / steps.length;
  const up = (log) => bottom - ((log - low) / (high - low)) * (bottom - top);
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": $("chart-text").textContent,
  });
  for (let decade = low; decade <= high; decade += Math.ceil((high - low) / 8)) {
    svg("path", { class: "grid", d: `M${left} ${up(decade)}H${width}` }, root);
    svg("text", { class: "tick", x: left - 8, y: up(decade) + 4 }, root).textContent =
      decade === 0 ? "1" : `10${raised(decade)}`;
  }
  const known = [...sizes.keys()].filter((k) => k > now || (k === now && stage >= 1));
  const points = known.map((k) => [across(k), up(Math.log10(sizes[k]))]);
  svg("polyline", { class: "line", points }, root);
  known.forEach((k, i) => svg("circle", {
    class: k === now ? "dot now" : "dot", cx: points[i][0], cy: points[i][1], r: k === now ? 6 : 4,
  }, root));
  steps.forEach(({ c }, k) => {
    const name = svg("text", { class: k === now ? "name now" : "name", x: across(k), y: height - 8 }, root);
    name.textContent = glyph(c);
  });
  $("chart").replaceChildren(root);
}

// --- Everything --------------------------------------------------------------------------------

function show() {
  if (!steps.length) return;
  const back = view === "backward";
  const [k, stage] = frames[view][place[view]];
  const last = frames[view].length - 1;
  const name = OPERATIONS[view][stage][0];
  const [title, equation, sentence] = explain(k, stage);
  document.body.classList.toggle("backward", back);
  $("loss").hidden = $("vanishing").hidden = !back;
  for (const button of $("views").children) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
  $("row-text").textContent = back
    ? "The gradient flows from right to left. A tile is ∂L/∂h at that step, and the number its norm."
    : "One cell, drawn once for each character. A tile is the hidden state. " +
      "Above it is the likeliest next character, underlined if it is right.";
  $("cell-title").textContent = `Inside the cell, step ${k + 1}`;
  write($("stage"), title);
  write($("sentence"), sentence);
  $("equation").textContent = equation;
  showRow(k, stage);
  showDiagram(k, stage);
  showNumbers(k, stage);
  showLegend(k);
  if (back) showChart(k, stage);
  $("slider").max = last;
  $("slider").value = place[view];
  $("slider").setAttribute("aria-valuetext", `step ${k + 1} of ${steps.length}, ${spoken(steps[k].c)}: ${name}`);
  write($("place"), `${k + 1} of ${steps.length} · ${name}`);
  // not `disabled`, which would take the focus from the button
  $("back").setAttribute("aria-disabled", String(place[view] === 0));
  for (const id of ["next", "skip"]) $(id).setAttribute("aria-disabled", String(place[view] === last));
  if (!timer) $("status").textContent = `Step ${k + 1}, ${spoken(steps[k].c)}. ${title}. ${sentence}`;
}

function rebuild() {
  readPalette();
  buildDiagram();
  show();
}

/** After a control is used: stop playing, then act. */
function on(id, event, act) {
  $(id).addEventListener(event, () => { pause(); act($(id)); });
}

on("text", "input", (text) => { view = "forward"; read(text.value, true); });
on("loss-step", "change", (select) => choose(Number(select.value)));
on("loss-target", "change", (select) => choose(loss.step, Number(select.value)));
on("back", "click", () => go(place[view] - 1));
on("next", "click", () => go(place[view] + 1));
on("skip", "click", () => goSteps(1));
on("slider", "input", (slider) => go(Number(slider.value)));
on("unit", "input", (input) => { if (input.value && input.validity.valid) follow(input.value - 1); });
$("play").addEventListener("click", play);
for (const button of $("views").children) {
  button.addEventListener("click", () => { pause(); view = button.dataset.view; show(); });
}
document.addEventListener("keydown", (event) => {
  const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const typing = event.target.matches("#text, #unit, select"); // there, arrows move the cursor
  if (!direction || typing || !steps.length || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  pause();
  if (event.shiftKey) goSteps(direction);
  else go(place[view] + direction);
});

const count = Object.values(weights).reduce((sum, weight) => sum + weight.length, 0);
$("facts").textContent = `This network reads ${V} different characters and has ${H} hidden units, ` +
  `${count.toLocaleString("en")} weights in all. Every number on the page is computed from them in your browser.`;
$("unit").max = H;
$("loss-target").replaceChildren(...characters.map((_, c) => new Option(glyph(c), c)));
for (const text of facts.examples) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => { pause(); $("text").value = text; read(text, false); });
  $("examples").append(button);
}
readPalette();
buildDiagram();
$("text").value = facts.examples[0] ?? "";
read($("text").value, false);
darkness.addEventListener("change", rebuild);
new ResizeObserver(([{ contentRect: { width } }]) => {
  if (width > 0 && $("diagram").clientWidth !== parts.room) rebuild();
}).observe($("diagram"));
