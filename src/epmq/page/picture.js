// From a picture to the inputs of the model, as the Python processor makes them: its sizes, its filter, its rounding.
// (A canvas would resize in a way of its own, and another one in every browser.)
"use strict";

// Filter by its number in Pillow → how far it reaches, and its weight at a distance.
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, cubic],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  5: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
};
const NEAREST = 0;
// Weights are whole numbers of this fraction.
const UNIT = 2 ** 22;

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function cubic(x) {
  const far = Math.abs(x);
  if (far < 1) return (1.5 * far - 2.5) * far * far + 1;
  return far < 2 ? ((-0.5 * far + 2.5) * far - 4) * far + 2 : 0;
}

// For each new place: the first old one that it is made of, and the weights from there on.
function weightsOf(before, after, filter) {
  const scale = before / after;
  if (filter === NEAREST) {
    let from = -0.5 * scale; // a sum, with the rounding of one
    return Array.from({ length: after }, () => [Math.floor((from += scale)), [UNIT]]);
  }
  const [reach, weight] = FILTERS[filter];
  const wide = Math.max(scale, 1);
  return Array.from({ length: after }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach * wide + 0.5));
    const end = Math.min(before, Math.trunc(center + reach * wide + 0.5));
    const found = Array.from({ length: end - first }, (_, i) => weight((first + i - center + 0.5) / wide));
    const sum = found.reduce((one, other) => one + other, 0);
    return [first, found.map((one) => (one / sum) * UNIT).map((one) => Math.trunc(one + (one < 0 ? -0.5 : 0.5)))];
  });
}

// A picture is { width, height, data }, three bytes a place, row by row. Rows are resized first, as Pillow did before 13.
function resized(picture, width, height, filter) {
  const rows = resizedRows(picture, width, filter);
  return transposed(resizedRows(transposed(rows), height, filter));
}

function resizedRows({ width, height, data }, size, filter) {
  if (size === width) return { width, height, data };
  const made = new Uint8ClampedArray(3 * size * height);
  weightsOf(width, size, filter).forEach(([first, weights], column) => {
    for (let row = 0; row < height; row++) {
      for (let color = 0; color < 3; color++) {
        let sum = UNIT / 2;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * data[3 * (row * width + first + i) + color];
        made[3 * (row * size + column) + color] = Math.floor(sum / UNIT);
      }
    }
  });
  return { width: size, height, data: made };
}

function transposed({ width, height, data }) {
  const made = new Uint8ClampedArray(data.length);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      for (let color = 0; color < 3; color++) {
        made[3 * (column * height + row) + color] = data[3 * (row * width + column) + color];
      }
    }
  }
  return { width: height, height: width, data: made };
}

// The part in the middle, with black around it where the picture is too small.
function cropped(picture, width, height) {
  const left = offset(picture.width, width), top = offset(picture.height, height);
  const data = new Uint8ClampedArray(3 * width * height);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const [x, y] = [column + left, row + top];
      if (x < 0 || y < 0 || x >= picture.width || y >= picture.height) continue;
      for (let color = 0; color < 3; color++) {
        data[3 * (row * width + column) + color] = picture.data[3 * (y * picture.width + x) + color];
      }
    }
  }
  return { width, height, data };
}

function offset(has, wants) {
  return has >= wants ? Math.floor((has - wants) / 2) : -Math.ceil((wants - has) / 2);
}

// Width and height that a picture is resized to.
function sizeOf({ width, height }, size) {
  if (!size.shortest_edge) return [size.width, size.height];
  const long = (edge, other) => Math.trunc((size.shortest_edge * other) / edge);
  return width <= height
    ? [size.shortest_edge, long(width, height)]
    : [long(height, width), size.shortest_edge];
}

// What the model is given: [3, height, width].
function preparedPicture(picture, settings) {
  if (settings.size) picture = resized(picture, ...sizeOf(picture, settings.size), settings.filter);
  if (settings.crop) picture = cropped(picture, settings.crop.width, settings.crop.height);
  const { width, height, data } = picture, places = width * height;
  const values = new Float32Array(3 * places);
  for (let place = 0; place < places; place++) {
    for (let color = 0; color < 3; color++) {
      values[color * places + place] = (data[3 * place + color] * settings.factor - settings.mean[color]) / settings.std[color];
    }
  }
  return { width, height, values };
}

function pictureInputs(picture, settings) {
  const { width, height, values } = preparedPicture(picture, settings);
  return { pixel_values: { type: "float32", data: values, shape: [1, 3, height, width] } };
}

// A picture from a file: what the browser decodes, without transparency.
async function decodedPicture(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data;
  const data = new Uint8ClampedArray(3 * width * height);
  for (let place = 0; place < width * height; place++) {
    for (let color = 0; color < 3; color++) data[3 * place + color] = pixels[4 * place + color];
  }
  return { width, height, data };
}

if (typeof module !== "undefined") module.exports = { preparedPicture };
