// Images as a bundle wants them, and what its outputs say: the same in browsers and in Node.
// Resizing follows Pillow's: filters widened when shrinking, weights of 22 bits, rounded to 8 bits after each direction.

const PRECISION_BITS = 22;
const FILTERS = {
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, x => {
    const a = -0.5;
    x = Math.abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }],
  lanczos: [3, x => (x > -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const sinc = x => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Round half to even, as Python does.
function round(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

function resizedShape(how, height, width) {
  const [tall, wide] = how.resize_size;
  if (how.resize === "none") return [height, width];
  if (how.resize === "exact") return [tall, wide];
  if (how.resize === "shortest") {
    const other = Math.trunc((tall * Math.max(height, width)) / Math.min(height, width));
    return height <= width ? [tall, other] : [other, tall];
  }
  const ratio = Math.min(height / tall, width / wide);
  return [round(height / ratio), round(width / ratio)];
}

// For each pixel of a line of `to` pixels: where its sources begin, and their weights.
function weights(from, to, [reach, filter]) {
  const scale = from / to, widened = Math.max(1, scale), support = reach * widened;
  return Array.from({length: to}, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const count = Math.min(from, Math.trunc(center + support + 0.5)) - first;
    const values = Array.from({length: count}, (_, j) => filter((j + first - center + 0.5) / widened));
    const sum = values.reduce((a, b) => a + b, 0);
    const whole = v => Math.trunc(v * 2 ** PRECISION_BITS + (v < 0 ? -0.5 : 0.5));
    return [first, Int32Array.from(values, v => whole(v / sum))];
  });
}

// Resize one direction of `rows` x `from` pixels: steps are bytes from one pixel, or line, to the next.
function resizeLines(source, made, rows, table, stepIn, lineIn, stepOut, lineOut) {
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < table.length; i++) {
      const [first, w] = table[i];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (PRECISION_BITS - 1);
        let at = row * lineIn + first * stepIn + channel;
        for (let j = 0; j < w.length; j++, at += stepIn) sum += source[at] * w[j];
        made[row * lineOut + i * stepOut + channel] = Math.min(255, Math.max(0, sum >> PRECISION_BITS));
      }
    }
  }
  return made;
}

// The source of each pixel of a line, by a sum of steps as Pillow has it, errors of rounding included.
function nearest(from, to) {
  const found = new Int32Array(to), step = from / to;
  for (let i = 0, at = step * 0.5; i < to; i++, at += step) found[i] = Math.min(from - 1, Math.trunc(at));
  return found;
}

function resize(rgb, height, width, tall, wide, interpolation) {
  if (interpolation === "nearest") {
    const made = new Uint8Array(tall * wide * 3);
    const rows = nearest(height, tall), columns = nearest(width, wide);
    for (let y = 0; y < tall; y++) {
      for (let x = 0; x < wide; x++) {
        const at = 3 * (rows[y] * width + columns[x]);
        made.set(rgb.subarray(at, at + 3), 3 * (y * wide + x));
      }
    }
    return made;
  }
  const filter = FILTERS[interpolation];
  if (wide !== width) {
    const table = weights(width, wide, filter);
    rgb = resizeLines(rgb, new Uint8Array(height * wide * 3), height, table, 3, 3 * width, 3, 3 * wide);
  }
  if (tall !== height) {
    const table = weights(height, tall, filter);
    rgb = resizeLines(rgb, new Uint8Array(tall * wide * 3), wide, table, 3 * wide, 3, 3 * wide, 3);
  }
  return rgb;
}

/** Return the input of a model, Float32Array of 3 x height x width, of RGB bytes (height x width x 3); `how` is a bundle's preprocessing. */
export function prepare(rgb, height, width, how) {
  const [tall, wide] = resizedShape(how, height, width);
  if (tall !== height || wide !== width) rgb = resize(rgb, height, width, tall, wide, how.interpolation);
  const [rows, columns] = how.crop_size;
  // Where the image stands on a canvas of black that has room for the crop, and where the crop stands there.
  const place = (size, crop) => {
    const canvas = Math.max(size, tall < rows || wide < columns ? crop : size);
    const left = (canvas - crop) / 2;
    return (how.crop_offset === "floor" ? Math.floor(left) : round(left)) - Math.floor((canvas - size) / 2);
  };
  const top = place(tall, rows), left = place(wide, columns);
  const made = new Float32Array(3 * rows * columns);
  for (let channel = 0; channel < 3; channel++) {
    const mean = Math.fround(how.mean[channel]), std = Math.fround(how.std[channel]);
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        const inside = y + top >= 0 && y + top < tall && x + left >= 0 && x + left < wide;
        const value = inside ? rgb[3 * ((y + top) * wide + x + left) + channel] : 0;
        made[(channel * rows + y) * columns + x] = Math.fround(Math.fround(Math.fround(value / 255) - mean) / std);
      }
    }
  }
  return made;
}

/** Return RGB bytes of RGBA bytes: transparency is dropped. */
export function withoutAlpha(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    rgb[to] = rgba[from];
    rgb[to + 1] = rgba[from + 1];
    rgb[to + 2] = rgba[from + 2];
  }
  return rgb;
}

/** Return [{label, probability}] of a classifier, best first, or [{label, value}] of another model; `about` is bundle.json. */
export function answer(output, about, top = 5) {
  const name = i => about.labels?.[i] ?? String(i);
  const values = Array.from(output);
  if (about.head === "regression") return values.map((value, i) => ({label: name(i), value}));
  if (about.head !== "single_label" && about.head !== "multi_label") return values.map((value, i) => ({label: String(i), value}));
  let probabilities = values.map(x => 1 / (1 + Math.exp(-x)));
  if (about.head === "single_label") {
    const most = values.reduce((a, b) => Math.max(a, b));
    const powers = values.map(x => Math.exp(x - most));
    const sum = powers.reduce((a, b) => a + b, 0);
    probabilities = powers.map(x => x / sum);
  }
  return probabilities.map((probability, i) => ({label: name(i), probability}))
    .sort((a, b) => b.probability - a.probability).slice(0, top);
}
