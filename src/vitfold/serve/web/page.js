// A bundle in this browser: nothing is sent anywhere, and all files are of this folder.
import * as ort from "./ort/ort.wasm.min.mjs";
import {answer, prepare, withoutAlpha} from "./preprocess.js";

const get = id => document.getElementById(id);
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
// Threads share memory, which browsers allow only to pages that are cross-origin isolated.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency || 1) : 1;

async function start() {
  const about = await (await fetch("bundle.json")).json();
  const externalData = about.data.map(path => ({path, data: path}));
  const session = await ort.InferenceSession.create(about.model, {executionProviders: ["wasm"], externalData});
  return {about, session};
}

async function decode(file, how) {
  const options = {
    imageOrientation: how.exif === "apply" ? "from-image" : "none",
    premultiplyAlpha: "none",
    colorSpaceConversion: "none",
  };
  const bitmap = await createImageBitmap(file, options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** Return {pixels, output, prepare_ms, model_ms} of a file. */
export async function predict({about, session}, file) {
  const image = await decode(file, about.preprocess);
  const began = performance.now();
  const pixels = prepare(withoutAlpha(image.data), image.height, image.width, about.preprocess);
  const prepared = performance.now();
  const fed = {[about.input]: new ort.Tensor("float32", pixels, [1, 3, ...about.preprocess.crop_size])};
  const made = await session.run(fed);
  const done = performance.now();
  return {pixels, output: made[about.output].data, prepare_ms: prepared - began, model_ms: done - prepared};
}

function row(name, value, share) {
  const line = get("rows").insertRow();
  line.insertCell().textContent = name;
  line.insertCell().textContent = value;
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.width = 100 * share + "%";
  line.insertCell().append(bar);
}

async function show(file) {
  get("error").textContent = get("timing").textContent = "";
  get("rows").replaceChildren();
  get("shown").src = URL.createObjectURL(file);
  get("shown").hidden = false;
  try {
    const opened = await ready;
    const made = await predict(opened, file).catch(error => {
      throw error.name === "InvalidStateError" ? new Error("this browser cannot read the file as a picture") : error;
    });
    const said = answer(made.output, opened.about);
    for (const one of said.slice(0, 10)) {
      if ("probability" in one) row(one.label, (100 * one.probability).toFixed(1) + " %", one.probability);
      else row(one.label, one.value.toPrecision(4), 0);
    }
    if (said.length > 10) row("...", said.length + " numbers", 0);
    const threads = ort.env.wasm.numThreads;
    get("timing").textContent = `model ${made.model_ms.toFixed(0)} ms on ${threads} thread${threads > 1 ? "s" : ""}, ` +
      `preparing ${made.prepare_ms.toFixed(0)} ms`;
  } catch (error) {
    get("error").textContent = error.message;
  }
}

const drop = get("drop");
drop.addEventListener("dragover", event => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", event => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
});
get("file").addEventListener("change", event => { if (event.target.files.length) show(event.target.files[0]); });

export const ready = start();
ready.then(({about}) => {
  document.title = get("name").textContent = about.name;
  get("state").textContent = "ready";
}, error => { get("error").textContent = "the model cannot be opened: " + error.message; get("state").textContent = ""; });
