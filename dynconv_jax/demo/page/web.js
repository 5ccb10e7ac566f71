// Networks run in the browser, by onnxruntime-web.

import {readPixels, seenBox} from './draw.js';

export const note = 'in this browser, on one thread';
export const privacy = 'It stays in your browser.';
export const slow = 'Loading the network …';

// A box of more pixels a side is shrunk by the browser first.
const MAX_SIDE = 2048;

let runtime, description, turns = 0;
// What runs, one thing at a time.
let running = Promise.resolve();
const sessions = new Map();

/** Takes networks.json. */
export function start(given) {
  description = given;
}

async function loadRuntime() {
  const url = new URL(description.runtime, document.baseURI).href;
  const ort = await import(`${url}ort.wasm.bundle.min.mjs`).catch(() => {
    throw new Error(`cannot load ONNX Runtime from ${url}`);
  });
  ort.env.wasm.wasmPaths = {wasm: `${url}ort-wasm-simd-threaded.wasm`};
  ort.env.wasm.numThreads = 1;
  return ort;
}

/** Returns a session; a file is loaded once. */
function open(network, form) {
  const path = network.paths[form];
  if (!sessions.has(path)) {
    const load = async () => {
      runtime ??= loadRuntime();
      const [ort, response] = await Promise.all([runtime, fetch(path)]);
      if (!response.ok) throw new Error(`cannot load ${path}: ${response.status}`);
      const bytes = new Uint8Array(await response.arrayBuffer());
      return ort.InferenceSession.create(bytes, {executionProviders: ['wasm']});
    };
    const session = load();
    session.catch(() => { sessions.delete(path); runtime = undefined; });
    sessions.set(path, session);
  }
  return sessions.get(path);
}

// Pillow counts in integers of 22 bits behind the point.
const ONE = 2 ** 22;
const toByte = sum => Math.floor(sum / ONE + 0.5);

/** Returns the weights of Pillow's bilinear filter: one [first, ...weights] for
 * each of n pixels of what lies from start to stop among length pixels. */
function filter(start, stop, length, n) {
  [start, stop] = [Math.fround(start), Math.fround(stop)];  // As Pillow does.
  const scale = Math.fround(stop - start) / n, support = Math.max(scale, 1);
  return Array.from({length: n}, (_, i) => {
    const center = start + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const last = Math.min(length, Math.trunc(center + support + 0.5));
    const weights = Array.from({length: last - first}, (_, k) =>
      Math.max(0, 1 - Math.abs((first + k + 0.5 - center) / support)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, ...weights.map(weight => Math.round(ONE * weight / sum))];
  });
}

/** Returns size x size pixels, RGB, of a box of a picture, as Pillow's resize
 * does with BILINEAR: rows first, then columns, each rounded to 8 bits. */
export function resample({data, width, height}, [left, top, right, bottom], size) {
  const rows = new Uint8ClampedArray(height * size * 3);
  filter(left, right, width, size).forEach(([first, ...weights], x) => {
    for (let y = 0; y < height; y++) {
      for (let k = 0; k < 3; k++) {
        let sum = 0, from = 4 * (y * width + first) + k;
        for (const weight of weights) { sum += weight * data[from]; from += 4; }
        rows[3 * (y * size + x) + k] = toByte(sum);
      }
    }
  });
  const result = new Uint8ClampedArray(size * size * 3);
  filter(top, bottom, height, size).forEach(([first, ...weights], y) => {
    for (let i = 0; i < 3 * size; i++) {
      let sum = 0, from = 3 * size * first + i;
      for (const weight of weights) { sum += weight * rows[from]; from += 3 * size; }
      result[3 * size * y + i] = toByte(sum);
    }
  });
  return result;
}

/** Returns float32[size * size * 3], the photograph as the network reads it. */
function preprocess(network, bitmap) {
  const {image_size: size, mean, std} = network;
  const box = seenBox(bitmap.width, bitmap.height, network);
  // The filter reaches this far out of the box.
  const margin = Math.max(box[2] - box[0], box[3] - box[1]) / size + 1;
  const outer = [
    ...box.slice(0, 2).map(x => Math.max(0, Math.floor(x - margin))),
    Math.min(bitmap.width, Math.ceil(box[2] + margin)),
    Math.min(bitmap.height, Math.ceil(box[3] + margin)),
  ];
  const [w, h] = [outer[2] - outer[0], outer[3] - outer[1]];
  const scale = Math.min(1, MAX_SIDE / Math.max(w, h));
  const [width, height] = [w, h].map(n => Math.max(1, Math.round(n * scale)));
  const pixels = readPixels(bitmap, outer, width, height);
  const inner = box.map((x, i) => (x - outer[i % 2]) * (i % 2 ? height / h : width / w));
  const bytes = resample(pixels, inner, size);
  return Float32Array.from(bytes, (value, i) => (value / 255 - mean[i % 3]) / std[i % 3]);
}

function softmax(logits) {
  const max = Math.max(...logits);
  const powers = Array.from(logits, x => Math.exp(x - max));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(x => x / sum);
}

// Lets the browser paint.
const pause = () => new Promise(resolve => setTimeout(resolve));

const median = values => values.sort((a, b) => a - b)[values.length >> 1];

/** Returns the median milliseconds of each form, which take turns; null where
 * another prediction is wanted meanwhile. */
async function measure(network, tensor, turn) {
  const forms = Object.keys(network.paths), times = {};
  for (const form of forms) {
    times[form] = [];
    await (await open(network, form)).run({images: tensor});
  }
  for (let i = 0; i < description.timed_calls; i++) {
    for (const form of forms) {
      const session = await open(network, form);
      await pause();
      if (turn !== turns) return null;
      const start = performance.now();
      await session.run({images: tensor});
      times[form].push(performance.now() - start);
    }
  }
  return Object.fromEntries(forms.map(form => [`${form}_ms`, median(times[form])]));
}

/** Returns what a network makes of a photograph; see networks.py, predict.
 * The times come later. */
export async function predict(network, photo) {
  const turn = ++turns, form = network.gated ? 'sparse' : 'dense';
  await running.catch(() => {});
  const session = await open(network, form);
  const size = network.image_size;
  const {Tensor} = await runtime;
  const tensor = new Tensor('float32', preprocess(network, photo.bitmap), [1, size, size, 3]);
  const outputs = await session.run({images: tensor});
  running = measure(network, tensor, turn);
  running.catch(() => {});  // Whoever waits for the times is told.
  const bits = {0: '0', 1: '1'};
  return {
    probabilities: softmax(outputs.logits.data),
    macs: network.gated
      ? network.always_macs + outputs.executed_macs.data[0] : network.dense_macs,
    masks: network.blocks.map(
      block => Array.from(outputs[block.output].data, x => bits[x]).join('')),
    times: running,
  };
}
