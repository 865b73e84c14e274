// The page: opens the model, asks it, and shows what all its tasks say. Nothing is fetched.
"use strict";

// Name → the pieces of a file, as the scripts beside this one bring them: gzip, in base64.
const pieces = {};
let settings;
// Classes that a task shows at most.
const SHOWN = 8;

function piece(name, text) {
  (pieces[name] ??= []).push(text);
}

function decoded(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let place = 0; place < binary.length; place++) bytes[place] = binary.charCodeAt(place);
  return bytes;
}

async function unpacked(name) {
  const stream = new Blob(pieces[name].map(decoded)).stream().pipeThrough(new DecompressionStream("gzip"));
  delete pieces[name];
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function openModel() {
  const glue = new Blob([await unpacked("glue")], { type: "text/javascript" });
  ort.env.wasm.numThreads = 1; // more would need headers that only a server sends
  ort.env.wasm.wasmBinary = (await unpacked("wasm")).buffer;
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(glue) };
  const large = settings.large === null ? [] : [{ path: settings.large, data: await unpacked("large") }];
  return ort.InferenceSession.create(await unpacked("model"), { executionProviders: ["wasm"], externalData: large });
}

// Task → its scores.
async function scoresOf(session, inputs) {
  const missing = session.inputNames.filter((name) => !(name in inputs));
  if (missing.length) throw new Error(`the model asks for ${missing.join(", ")}`);
  const tensors = session.inputNames.map((name) => {
    const { type, data, shape } = inputs[name];
    return [name, new ort.Tensor(type, data, shape)];
  });
  const outputs = await session.run(Object.fromEntries(tensors), settings.tasks.map(({ name }) => name));
  return Object.fromEntries(Object.entries(outputs).map(([name, { data }]) => [name, Array.from(data)]));
}

const element = (id) => document.getElementById(id);

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

function shares(task, scores) {
  if (task.answers === "labels") return scores.map((score) => 1 / (1 + Math.exp(-score)));
  const most = Math.max(...scores), powers = scores.map((score) => Math.exp(score - most));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((power) => power / sum);
}

const nameOf = (task, number) => task.labels[number] ?? `class ${number}`;

function answerOf(task, scores) {
  if (task.answers === "number") return scores.map((score) => score.toPrecision(4)).join(", ");
  if (task.answers === "class") return nameOf(task, scores.indexOf(Math.max(...scores)));
  const chosen = scores.flatMap((score, number) => (score > 0 ? [nameOf(task, number)] : []));
  return chosen.join(", ") || "none";
}

function made(tag, className, text = "") {
  const one = document.createElement(tag);
  one.className = className;
  one.textContent = text;
  return one;
}

// The rows of a task: all its classes in their order, or the likeliest if there are many.
function rowsOf(task, scores) {
  const found = scores === null ? task.labels.map(() => null) : shares(task, scores);
  let numbers = found.map((_, number) => number);
  if (numbers.length > SHOWN) numbers = numbers.sort((one, other) => found[other] - found[one]).slice(0, SHOWN);
  const best = scores === null ? -1 : scores.indexOf(Math.max(...scores));
  return numbers.map((number) => {
    const chosen = scores !== null && (task.answers === "labels" ? scores[number] > 0 : number === best);
    const row = made("tr", chosen ? "chosen" : ""), bar = made("div", "bar"), track = made("div", "");
    const cell = made("td", "track");
    bar.style.width = `${100 * (found[number] ?? 0)}%`;
    track.append(bar);
    cell.append(track);
    const share = found[number] === null ? "" : `${(100 * found[number]).toFixed(1)} %`;
    row.append(made("th", "", nameOf(task, number)), cell, made("td", "share", share));
    row.firstChild.scope = "row";
    row.firstChild.title = row.firstChild.textContent;
    return row;
  });
}

function showTask(task, scores) {
  const card = element(`task-${settings.tasks.indexOf(task)}`);
  card.querySelector(".answer").textContent = scores === null ? "–" : answerOf(task, scores);
  card.querySelector("tbody").replaceChildren(...(task.answers === "number" ? [] : rowsOf(task, scores)));
  const more = (scores ?? task.labels).length - SHOWN;
  card.querySelector(".more").textContent = more > 0 && task.answers !== "number" ? `and ${more} more` : "";
}

function showAll(scores) {
  for (const task of settings.tasks) showTask(task, scores === null ? null : scores[task.name]);
}

// Ask for what there is to ask, in turn: of what comes in meanwhile, the last one follows.
function asker(session) {
  let isBusy = false, next;
  return async (prepare) => {
    next = prepare;
    if (isBusy) return;
    isBusy = true;
    while (next) {
      const now = next;
      next = undefined;
      await answer(session, now);
    }
    isBusy = false;
  };
}

async function answer(session, prepare) {
  try {
    const start = performance.now(), { inputs, about } = await prepare();
    if (inputs === null) {
      showAll(null);
      return say(about);
    }
    showAll(await scoresOf(session, inputs));
    say(`${about}, ${Math.round(performance.now() - start)} ms for ${settings.tasks.length === 1 ? "its task" : "all tasks"}`);
  } catch (error) {
    showAll(null);
    say(`This cannot be answered: ${error.message}`, true);
  }
}

function watchText(ask) {
  const { Tokenizer } = page_tokenizers, tokenizer = new Tokenizer(settings.input.tokenizer, settings.input.config);
  const prepare = () => {
    const text = element("text").value;
    if (!text.trim()) return { inputs: null, about: "Ready" };
    const inputs = textInputs(tokenizer, text, settings.input), count = inputs.input_ids.data.length;
    return { inputs, about: `${count} ${count === 1 ? "token" : "tokens"}` };
  };
  let timer;
  element("text").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => ask(prepare), 150);
  });
  element("text").disabled = false;
  return ask(prepare);
}

function watchPicture(ask) {
  const field = element("picture"), place = element("drop"), seen = element("seen");
  const take = (file) => {
    if (!file) return;
    URL.revokeObjectURL(seen.src);
    seen.src = URL.createObjectURL(file);
    seen.alt = file.name;
    place.classList.add("filled");
    ask(async () => {
      const picture = await decodedPicture(file);
      return { inputs: pictureInputs(picture, settings.input), about: `${picture.width} × ${picture.height} pixels` };
    });
  };
  field.addEventListener("change", () => take(field.files[0]));
  document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      place.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    });
  }
  document.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
  field.disabled = false;
  say("Ready");
}

async function start() {
  try {
    showAll(null);
    await new Promise((resolve) => setTimeout(resolve)); // lets the page be drawn
    const ask = asker(await openModel());
    await (settings.kind === "text" ? watchText(ask) : watchPicture(ask));
    document.documentElement.dataset.state = "ready";
  } catch (error) {
    say(`The model cannot be opened: ${error.message}`, true);
    document.documentElement.dataset.state = "failed";
  }
}

document.addEventListener("DOMContentLoaded", start);
