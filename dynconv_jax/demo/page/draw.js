// Photographs, masks and colors. No network, no page.

// Matplotlib's inferno from 0.15 to 0.93, and the weights of a picture below
// it: as in dynconv_jax/plotting/ponder.py.
const STOPS = ('2b0b57 490b6a 62146e 7d1e6d 972766 b1325a ca404a de5238 ee6a24 ' +
  'f8870e fca50a fac62d f2e661').split(' ').map(hex => [0, 2, 4].map(
  i => parseInt(hex.slice(i, i + 2), 16)));
const OPACITY = 0.35, GREY_SHARE = 0.22, UNSEEN = 0.2;

const COLORS = Array.from({length: 256}, (_, i) => {
  const place = i / 255 * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[low].map((c, k) => c + (place - low) * (STOPS[low + 1][k] - c));
});

const roundHalfEven = x => {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + floor % 2 : Math.round(x);
};

/** Returns [left, top, right, bottom], what a network sees of a picture.
 * See data/decode.py, evaluation_box. */
export function seenBox(width, height, network) {
  const {image_size: size, short_side: short} = network;
  const starts = [], stops = [];
  for (const length of [width, height]) {
    const resized = Math.floor(short * length / Math.min(width, height));
    const start = roundHalfEven((resized - size) / 2);
    starts.push(Math.max(0, start * length / resized));
    stops.push(Math.min(length, (start + size) * length / resized));
  }
  return [...starts, ...stops];
}

/** Returns a canvas and its context. */
export function newCanvas(width, height, canvas = document.createElement('canvas')) {
  [canvas.width, canvas.height] = [Math.round(width), Math.round(height)];
  return [canvas, canvas.getContext('2d', {willReadFrequently: true})];
}

/** Returns pixels, RGBA, of a box of a bitmap over white, of a given size. */
export function readPixels(bitmap, [left, top, right, bottom], width, height) {
  const [, context] = newCanvas(width, height);
  context.fillStyle = 'white';
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(
    bitmap, left, top, right - left, bottom - top, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Returns the share of masks that are active at each of size x size pixels.
 * Masks are {size: [h, w], values: text of 0 and 1}. */
export function ponderCost(masks, size) {
  const cost = new Float32Array(size * size);
  for (const {size: [h, w], values} of masks) {
    for (let y = 0; y < size; y++) {
      const row = Math.floor((2 * y + 1) * h / (2 * size)) * w;
      for (let x = 0; x < size; x++) {
        const column = Math.floor((2 * x + 1) * w / (2 * size));
        if (values[row + column] === '1') cost[y * size + x] += 1;
      }
    }
  }
  return cost.map(count => count / masks.length);
}

/** Colors pixels in place by the cost, size x size, of the box that was seen. */
export function overlay(image, cost, size, [left, top, right, bottom]) {
  const {data, width, height} = image;
  for (let y = 0, i = 0; y < height; y++) {
    const row = Math.floor((y + 0.5 - top) / (bottom - top) * size);
    for (let x = 0; x < width; x++, i += 4) {
      const column = Math.floor((x + 0.5 - left) / (right - left) * size);
      const grey = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
      const seen = row >= 0 && row < size && column >= 0 && column < size;
      const color = seen && COLORS[Math.round(255 * cost[row * size + column])];
      const shade = OPACITY + (1 - OPACITY) * grey / 255;
      for (let k = 0; k < 3; k++) {
        data[i + k] = seen
          ? GREY_SHARE * grey + (1 - GREY_SHARE) * shade * color[k]
          : UNSEEN * grey;
      }
    }
  }
}

/** Darkens pixels in place that the network did not see. */
export function dimUnseen(image, [left, top, right, bottom]) {
  const {data, width, height} = image;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i += 4) {
      if (x + 0.5 < left || x + 0.5 > right || y + 0.5 < top || y + 0.5 > bottom) {
        for (let k = 0; k < 3; k++) data[i + k] *= 0.4;
      }
    }
  }
}
