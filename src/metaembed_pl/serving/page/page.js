// The page of `metaembed-pl serve`. A query is encoded once, and kept by the service under an id;
// dragging the budget only searches. /openapi.json describes the responses.

const $ = (id) => document.getElementById(id);
const state = {
  shelf: null, // what api/store says
  picture: null, // a file that was chosen or dropped
  query: null, // id of the query that was asked last
  answer: null, // of the last search
  why: null, // the explanation that is open
};
const SVG = "http://www.w3.org/2000/svg";

async function call(path, options) {
  const response = await fetch(path, options);
  const value = await response.json().catch(() => ({ error: `the service returned ${response.status}` }));
  if (!response.ok) throw Object.assign(new Error(value.error), { status: response.status });
  return value;
}

function address(path, values) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const one of [value].flat()) parts.append(name, one);
  }
  return `${path}?${parts}`;
}

// Runs one task at a time and, of those that come meanwhile, the last.
function latest(task) {
  let running = false, again = false;
  return async function run() {
    if (running) { again = true; return; }
    running = true;
    try { await task(); } catch (error) { say(error.message, true); }
    running = false;
    if (again) { again = false; run(); }
  };
}

function say(words, wrong = false) {
  $("said").textContent = words || "\u00a0";
  $("said").classList.toggle("wrong", wrong);
}

const ask = latest(async () => {
  const text = $("text").value.trim();
  if (!text && !state.picture) return;
  if (state.picture && state.picture.size > state.shelf.max_upload_bytes) {
    throw new Error(`The picture is larger than ${bytes(state.shelf.max_upload_bytes)}.`);
  }
  const form = new FormData();
  if (text) form.append("text", text);
  if (state.picture) form.append("picture", state.picture);
  const question = await call("api/queries", { method: "POST", body: form });
  state.query = question.query;
  await find();
});

const search = latest(async () => {
  if (!state.query) return;
  try {
    await find();
  } catch (error) {
    if (error.status !== 404) throw error;
    state.query = null; // forgotten: the service was started anew, or much was asked since
    ask();
  }
});

async function find() {
  const where = $("where").value.split(",").map((part) => part.trim()).filter(Boolean);
  const values = { query: state.query, plan: plan().plan, top: $("top").value, where, normalised: true };
  state.answer = await call(address("api/search", values));
  if (state.answer.generation !== state.shelf.generation) await loadShelf();
  showAnswer();
}

function showAnswer() {
  const { results, milliseconds, bytes_read, items } = state.answer;
  $("spent-ms").textContent = `${digits(milliseconds)} ms`;
  $("spent-bytes").textContent = bytes(bytes_read);
  const best = results.length ? "Choose one to see why it was found." : "No results.";
  say(`${results.length} of ${items.toLocaleString("en")} items. ${best}`);
  moving($("results"), () => $("results").replaceChildren(...results.map(tile)));
}

const tiles = new Map(); // by id: a picture that stays is not loaded again

function tile(result, place) {
  const key = `${state.answer.generation} ${result.id}`;
  if (!tiles.has(key)) tiles.set(key, newTile(result));
  const item = tiles.get(key);
  item.querySelector(".score span").textContent = result.score.toFixed(3);
  item.querySelector(".bar i").style.width = `${100 * Math.max(0, Math.min(1, result.score))}%`;
  item.firstChild.setAttribute("aria-label", `${place + 1}. ${name(result)}, score ${result.score.toFixed(3)}: why?`);
  if (tiles.size > 1000) tiles.delete(tiles.keys().next().value);
  return item;
}

function newTile(result) {
  const frame = element("div", { className: "frame" });
  if (result.has_preview) {
    const src = address("api/preview", { item: result.id, generation: state.answer.generation });
    frame.append(element("img", { src, alt: "", decoding: "async" }));
  } else {
    frame.append(element("span", { textContent: result.text ?? result.id }));
  }
  const score = element("span", { className: "score" }, element("span"), element("span", { className: "bar" }, element("i")));
  const caption = element("span", { className: "caption", textContent: name(result), title: name(result) });
  const button = element("button", { type: "button", onclick: () => explain(result.id) }, frame, caption, score);
  const item = element("li", {}, button);
  item.dataset.id = result.id;
  return item;
}

function name({ id, text, metadata }) {
  if (metadata.file && metadata.page) return `${metadata.file}, page ${metadata.page}`;
  return text ?? metadata.asked_as ?? metadata.image ?? metadata.file ?? id.replace(/^sha256:(.{8}).*/, "$1");
}

// Moves what stays in a list from where it was to where it is.
function moving(list, change) {
  const before = new Map([...list.children].map((item) => [item, item.getBoundingClientRect()]));
  change();
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const item of list.children) {
    const from = before.get(item), to = item.getBoundingClientRect();
    if (!from) item.animate([{ opacity: 0 }, { opacity: 1 }], 160);
    else if (from.x !== to.x || from.y !== to.y) {
      const start = `translate(${from.x - to.x}px, ${from.y - to.y}px)`;
      item.animate([{ transform: start }, { transform: "none" }], { duration: 220, easing: "ease-out" });
    }
  }
}

const plan = () => state.shelf.plans[Number($("plan").value)];
const short = (words) => (words.includes(":") ? words.replaceAll(/:\d+/g, "").split(",").map(times).join(" → ") : times(words));
const times = (budget) => budget.replace("poolx", "the summed query×").replaceAll("x", "×");

function planWords({ plan }) {
  const stages = plan.split(",").map((stage) => stage.split(":"));
  if (stages[0].length === 1) {
    const [queries, candidates, width] = plan.split("x");
    const narrow = width ? `, the first ${width} components of each` : "";
    return `${count(queries, "vector")} of the query, ${candidates} of each item${narrow}`;
  }
  const [[first, keep], ...rest] = stages;
  const [asks, reach] = first.split("@");
  const begin = !reach ? `all items at ${times(first)}`
    : `the index, with ${asks === "pool" ? "the sum of the query’s vectors" : "each query vector"}`;
  if (reach) return [begin, ...rest.map(([budget]) => `its hits at ${times(budget)}`)].join(", then ");
  return [begin, ...rest.map(([budget], k) => `the best ${k ? rest[k - 1][1] : keep} at ${times(budget)}`)].join(", then ");
}

const count = (number, thing) => `${number} ${thing}${Number(number) === 1 ? "" : "s"}`;
const digits = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) { number /= 1000; unit += 1; }
  return `${unit ? digits(number) : number} ${units[unit]}`;
}

function showPlan() {
  const chosen = plan();
  $("plan-name").textContent = short(chosen.plan);
  $("plan").setAttribute("aria-valuetext", `${short(chosen.plan)}: ${planWords(chosen)}`);
  $("plan-words").textContent = planWords(chosen);
  $("spent-recall").textContent = chosen.recall === null ? "–" : percent(chosen.recall);
  drawPlot();
}

const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`;

async function loadShelf() {
  const shelf = await call("api/store");
  const before = state.shelf && plan().plan;
  state.shelf = shelf;
  const kept = shelf.plans.findIndex((one) => one.plan === before);
  $("plan").max = shelf.plans.length - 1;
  const standard = shelf.plans.findIndex((one) => one.plan === shelf.default_plan);
  $("plan").value = kept >= 0 ? kept : standard >= 0 ? standard : shelf.plans.length - 1;
  document.title = `${shelf.name} · metaembed`;
  $("name").textContent = shelf.name;
  const [r_q, r_c] = shelf.groups.at(-1).split("x");
  const projected = shelf.width < shelf.model_width ? `, projected from ${shelf.model_width}` : "";
  $("facts").textContent = `${count(shelf.items.toLocaleString("en"), "item")} · ${count(r_c, "vector")} each, ${shelf.width} components${projected}, ${shelf.dtype} · queries of ${r_q}`;
  const examples = shelf.examples.map((text) => element("button", {
    type: "button", textContent: text, onclick: () => { $("text").value = text; forget(); ask(); },
  }));
  $("examples").replaceChildren(...(examples.length ? ["Try ", ...examples] : ["\u00a0"]));
  showMeasurement(shelf.measurement);
  showPlan();
}

function showMeasurement({ state: how, used, error }) {
  const running = how === "running";
  $("auto").hidden = how !== "done";
  $("measure").hidden = how === "done";
  $("measure").disabled = running;
  $("measure").textContent = running ? "Measuring…" : "Measure this store";
  $("plot-words").textContent = {
    done: `Recall of each plan against the exact search’s top ten, measured with ${used}. ○ budgets, ◇ cascades.`,
    none: "The recall of each budget has not been measured on this store yet.",
    running: "Measuring every plan, with the items’ own texts as queries.",
    failed: error,
  }[how];
  if (running) setTimeout(() => loadShelf().catch((problem) => say(problem.message, true)), 700);
}

async function measure() {
  try {
    showMeasurement(await call("api/measurement", { method: "POST" }));
  } catch (error) {
    say(error.message, true);
  }
}

function chooseAuto() {
  $("plan").value = state.shelf.plans.findIndex((one) => one.plan === state.shelf.default_plan);
  showPlan();
  search();
}

function drawPlot() {
  const { plans } = state.shelf;
  const [left, right, top, bottom] = [30, 272, 12, 160];
  const least = Math.log10(Math.min(...plans.map((one) => one.cost)));
  const lowest = Math.floor(10 * Math.min(0.9, ...plans.map((one) => one.recall ?? 1))) / 10;
  const x = ({ cost }) => right - ((right - left) * Math.log10(cost)) / Math.min(-1, least);
  const y = ({ recall }) => bottom - ((bottom - top) * (recall - lowest)) / (1 - lowest);
  const parts = [];
  const line = (x1, y1, x2, y2) => parts.push(svg("line", { class: "grid", x1, y1, x2, y2 }));
  const word = (x, y, anchor, text, kind = "") => parts.push(svg("text", { x, y, "text-anchor": anchor, class: kind }, text));
  for (const recall of [lowest, (1 + lowest) / 2, 1]) {
    line(left, y({ recall }), right, y({ recall }));
    word(left - 5, y({ recall }) + 3.5, "end", Math.round(100 * recall));
  }
  for (let cost = 1; Math.log10(cost) >= Math.min(-1, least) - 0.01; cost /= 10) {
    word(x({ cost }), bottom + 14, "middle", `${+(100 * cost).toPrecision(1)} %`);
  }
  word((left + right) / 2, bottom + 28, "middle", "arithmetic, share of the exact search");
  const measured = plans.filter((one) => one.recall !== null);
  const front = measured.filter((one) => measured.every((other) => other.recall <= one.recall || other.cost > one.cost));
  parts.push(svg("path", { class: "front", d: front.map((one, k) => `${k ? "L" : "M"}${x(one)} ${y(one)}`).join("") }));
  for (const one of [...measured.filter((other) => other !== plan()), ...measured.filter((other) => other === plan())]) {
    const [cx, cy, now] = [x(one), y(one), one === plan() ? " now" : ""];
    const shape = one.plan.includes(":")
      ? svg("path", { class: `point cascade${now}`, d: `M${cx} ${cy - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z` })
      : svg("circle", { class: `point${now}`, cx, cy, r: 4.2 });
    shape.append(svg("title", {}, `${short(one.plan)}: ${percent(one.recall)}, ${digits(one.milliseconds)} ms`));
    shape.addEventListener("click", () => { $("plan").value = plans.indexOf(one); showPlan(); search(); });
    parts.push(shape);
    if (now) word(Math.min(Math.max(cx, left + 12), right - 12), cy > top + 20 ? cy - 10 : cy + 19, cx > right - 40 ? "end" : cx < left + 40 ? "start" : "middle", short(one.plan), "label");
  }
  if (!measured.length) word((left + right) / 2, (top + bottom) / 2 + 4, "middle", "not measured yet");
  $("plot").replaceChildren(...parts);
}

async function explain(id) {
  try {
    const values = { query: state.query, item: id, budget: state.answer.budget };
    state.why = await call(address("api/explanation", values));
  } catch (error) {
    say(error.message, true);
    return;
  }
  const { item, budget, products, winners } = state.why;
  $("why-score").textContent = name(item);
  const best = winners.map((column, row) => products[row][column]);
  const sum = best.length > 1 ? `${best.map((value) => value.toFixed(3)).join(" + ").replaceAll("+ -", "− ")} = ` : "";
  $("why-sum").textContent = `Score at ${times(budget)}: ${sum}${item.score.toFixed(3)}; ${(item.score / winners.length).toFixed(3)} a query vector`;
  const picture = $("look-picture");
  $("look").hidden = !item.has_preview && !state.why.maps;
  if (!$("look").hidden) picture.src = address("api/picture", { item: id, generation: state.answer.generation });
  picture.alt = name(item);
  drawMatrix();
  $("winners").replaceChildren(
    winnerButton("all", null),
    ...winners.map((column, row) => winnerButton(`q${row + 1} → c${column + 1}  ${best[row].toFixed(2)}`, column)),
  );
  const facts = Object.entries({ id: item.id, ...item.metadata }).flatMap(([key, value]) => [
    element("dt", { textContent: key }),
    element("dd", { textContent: words(value) }),
  ]);
  $("why-metadata").replaceChildren(...facts);
  lookAt(null);
  $("why").showModal();
}

function words(value) {
  if (Array.isArray(value)) return value.map(words).join(", ");
  return typeof value === "object" ? JSON.stringify(value) : value;
}

function winnerButton(words, column) {
  const button = element("button", { type: "button", textContent: words, onclick: () => lookAt(column, button) });
  return element("li", {}, button);
}

// Shows where one vector of the item looks; null: all that a query vector met.
function lookAt(column, pressed = $("winners").querySelector("button")) {
  const { maps, winners, why_no_maps } = state.why;
  for (const button of $("winners").querySelectorAll("button")) button.setAttribute("aria-pressed", button === pressed);
  $("matrix").querySelector(".column")?.remove();
  if (column !== null) $("matrix").append(columnFrame(column));
  const canvas = $("look-heat");
  canvas.hidden = $("look-scale").hidden = !maps;
  if (!maps) {
    $("look-words").textContent = `No attention maps: ${why_no_maps}.`;
    return;
  }
  const seen = column === null ? winners : [column];
  const mean = maps.weights[0].map((_, patch) => seen.reduce((sum, one) => sum + maps.weights[one][patch], 0) / seen.length);
  drawHeat(canvas, maps.width, maps.height, mean);
  const what = column === null ? "Average attention of the matched vectors" : `Attention of vector ${column + 1}`;
  const unlike = maps.agreement < 0.95 ? ` Drawn from the ${maps.drawn_from}, whose vectors differ from those in the store (cosine ${maps.agreement.toFixed(2)}).` : "";
  $("look-words").textContent = `${what}, patch by patch.${unlike}`;
}

// Darker than the picture: less than an even share of the attention; warmer: more.
function drawHeat(canvas, width, height, weights) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  weights.forEach((weight, patch) => {
    const strength = Math.max(-1, Math.min(1, Math.log2(Math.max(weight, 1e-6))));
    const colour = strength < 0 ? [0, 0, 0, -0.72 * strength] : [255, 140, 0, 0.6 * strength];
    image.data.set([...colour.slice(0, 3), 255 * colour[3]], 4 * patch);
  });
  context.putImageData(image, 0, 0);
}

const CELL = { width: 12, height: 12, left: 22, top: 14 };

function drawMatrix() {
  const { products, winners } = state.why;
  const [rows, columns] = [products.length, products[0].length];
  const flat = products.flat(), low = Math.min(...flat), high = Math.max(...flat);
  const parts = [];
  const at = (row, column) => ({ x: CELL.left + CELL.width * column, y: CELL.top + CELL.height * row });
  products.forEach((products, row) => products.forEach((product, column) => {
    const opacity = (0.04 + 0.96 * ((product - low) / (high - low || 1)) ** 1.5).toFixed(3);
    const { x, y } = at(row, column);
    parts.push(svg("rect", { class: "cell", x, y, width: CELL.width - 1, height: CELL.height - 1, rx: 1.5, opacity }));
  }));
  winners.forEach((column, row) => {
    const { x, y } = at(row, column);
    parts.push(svg("rect", { class: "winner", x: x - 0.5, y: y - 0.5, width: CELL.width, height: CELL.height, rx: 2 }));
  });
  products.forEach((products, row) => products.forEach((product, column) => {
    const hit = svg("rect", { class: "hit", ...at(row, column), width: CELL.width, height: CELL.height });
    hit.append(svg("title", {}, `query vector ${row + 1} · item vector ${column + 1} = ${product.toFixed(3)}`));
    hit.addEventListener("click", () => lookAt(column, null));
    parts.push(hit);
  }));
  const label = (x, y, anchor, text) => parts.push(svg("text", { x, y, "text-anchor": anchor, "font-size": 8, fill: "currentColor", opacity: 0.6 }, text));
  const ticks = (count) => [...new Set([0, count - 1, ...Array.from({ length: Math.floor(count / 8) }, (_, k) => 8 * k + 7)])];
  for (const row of ticks(rows)) label(CELL.left - 4, at(row, 0).y + 8.5, "end", `q${row + 1}`);
  for (const column of ticks(columns)) label(at(0, column).x + 5.5, CELL.top - 4, "middle", `c${column + 1}`);
  const [width, height] = [CELL.left + CELL.width * columns + 2, CELL.top + CELL.height * rows + 2];
  $("matrix").setAttribute("viewBox", `0 0 ${width} ${height}`);
  $("matrix").style.maxWidth = `${Math.max(2 * width, 160)}px`;
  $("matrix").replaceChildren(...parts);
}

function columnFrame(column) {
  return svg("rect", {
    class: "column", x: CELL.left + CELL.width * column - 1.5, y: CELL.top - 1.5, rx: 2.5,
    width: CELL.width + 2, height: CELL.height * state.why.products.length + 2,
  });
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function choose(file) {
  if (!file) return;
  forget();
  state.picture = file;
  $("chosen-picture").src = URL.createObjectURL(file);
  $("chosen").hidden = false;
  ask();
}

function forget() {
  if (state.picture) URL.revokeObjectURL($("chosen-picture").src);
  state.picture = null;
  $("chosen").hidden = true;
  $("file").value = "";
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("file").addEventListener("change", () => choose($("file").files[0]));
$("forget").addEventListener("click", () => { forget(); ask(); });
$("plan").addEventListener("input", () => { showPlan(); search(); });
$("top").addEventListener("change", search);
$("where").addEventListener("change", search);
$("measure").addEventListener("click", measure);
$("auto").addEventListener("click", chooseAuto);
$("close").addEventListener("click", () => $("why").close());
$("why").addEventListener("click", (event) => { if (event.target === $("why")) $("why").close(); });
document.addEventListener("paste", (event) => choose([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, select") || $("why").open) return;
  event.preventDefault();
  $("text").focus();
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  choose(event.dataTransfer.files[0]);
});

if (matchMedia("(max-width: 50rem)").matches) $("more").open = false;
loadShelf().catch((error) => say(error.message, true));
