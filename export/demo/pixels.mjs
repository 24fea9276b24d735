// A picture file to the pixels a model takes, as `preprocess` of bundle.json states it.
// Resampling follows Pillow: filters widened by the scale (antialiasing), weights of 22 fractional
// bits, rounded to 8 bits after each direction. Shapes: RGB bytes [H, W, 3], pixels [3, H, W].

const FRACTION = 2 ** 22;

const FILTERS = {
  bilinear: { support: 1, weight: x => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2, // Keys' cubic with a = -0.5
    weight: x => {
      x = Math.abs(x);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
    },
  },
  lanczos: {
    support: 3,
    weight: x => {
      if (x === 0) return 1;
      if (Math.abs(x) >= 3) return 0;
      const a = Math.PI * x;
      return (3 * Math.sin(a) * Math.sin(a / 3)) / (a * a);
    },
  },
};

/** A picture as Blob -> float32 [3, H, W], normalised. */
export async function readPixels(blob, spec) {
  return normalise(fit(await decode(blob, spec), spec), spec);
}

/** Upright opaque 8-bit RGB: {width, height, data}. Transparency shows the background. */
export async function decode(blob, spec) {
  const bitmap = await createImageBitmap(blob, {
    imageOrientation: "from-image",
    premultiplyAlpha: "none",
    colorSpaceConversion: "none",
  });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = `rgb(${spec.alpha.background.join(" ")})`;
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    data[to++] = rgba[from];
    data[to++] = rgba[from + 1];
    data[to++] = rgba[from + 2];
  }
  return { width, height, data };
}

/** Resize, then crop or pad to the model's size. */
export function fit(image, spec) {
  const [height, width] = spec.resize.size;
  const { mode, interpolation } = spec.resize;
  if (mode === "squash") return resize(image, width, height, interpolation);
  if (mode === "longest") {
    const ratio = Math.max(image.height / height, image.width / width);
    const [w, h] = [image.width, image.height].map(n => Math.max(1, roundEven(n / ratio)));
    return pad(resize(image, w, h, interpolation), width, height, spec.resize.background ?? [0, 0, 0]);
  }
  const [w, h] = covering(image, width, height);
  return crop(resize(image, w, h, interpolation), width, height);
}

/** RGB bytes to another size. */
export function resize(image, width, height, interpolation) {
  if (interpolation === "nearest") return nearest(image, width, height);
  const filter = FILTERS[interpolation];
  const wide = source => across(source, width, filter);
  const tall = source => down(source, height, filter);
  return downFirst(image, width, height) ? wide(tall(image)) : tall(wide(image));
}

/**
 * Which direction comes first, as observed of Pillow 13 (earlier ones always began across): as
 * each rounds to 8 bits, the order shows in a few pixels.
 */
function downFirst(image, width, height) {
  return height < image.height && image.height - height > 2 * (image.width - width);
}

function across({ width, height, data }, to, filter) {
  if (to === width) return { width, height, data };
  return { width: to, height, data: pass(data, height, width, to, filter, width * 3, 3) };
}

function down({ width, height, data }, to, filter) {
  if (to === height) return { width, height, data };
  return { width, height: to, data: pass(data, width, height, to, filter, 3, width * 3) };
}

/**
 * One direction. `lines` lines of `size` places become `lines` lines of `to` places; `lineStep` and
 * `step` are the distances in bytes from one line and from one place to the next.
 */
function pass(data, lines, size, to, filter, lineStep, step) {
  const out = new Uint8ClampedArray(lines * to * 3);
  // Across, places lie beside each other and lines below; down, it is the other way round.
  const [outLineStep, outStep] = step === 3 ? [to * 3, 3] : [3, lines * 3];
  for (let place = 0; place < to; place++) {
    const { first, weights } = weightsAt(place, size / to, size, filter);
    for (let line = 0; line < lines; line++) {
      let red = FRACTION / 2, green = red, blue = red;
      let at = line * lineStep + first * step;
      for (const weight of weights) {
        red += data[at] * weight;
        green += data[at + 1] * weight;
        blue += data[at + 2] * weight;
        at += step;
      }
      const target = line * outLineStep + place * outStep;
      out[target] = Math.floor(red / FRACTION);
      out[target + 1] = Math.floor(green / FRACTION);
      out[target + 2] = Math.floor(blue / FRACTION);
    }
  }
  return out;
}

/** The first input place and the whole-number weights behind one output place. */
function weightsAt(place, scale, size, filter) {
  const stretch = Math.max(scale, 1);
  const reach = filter.support * stretch;
  const centre = (place + 0.5) * scale;
  const first = Math.max(0, Math.trunc(centre - reach + 0.5));
  const last = Math.min(size, Math.trunc(centre + reach + 0.5));
  const raw = [];
  for (let at = first; at < last; at++) raw.push(filter.weight((at - centre + 0.5) * (1 / stretch)));
  const total = raw.reduce((sum, weight) => sum + weight, 0);
  return { first, weights: raw.map(w => roundAway((w / total) * FRACTION)) };
}

function nearest(image, width, height) {
  const data = new Uint8Array(width * height * 3);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * image.height) / height) * image.width;
    for (let x = 0; x < width; x++) {
      const from = (row + Math.floor(((x + 0.5) * image.width) / width)) * 3;
      data.set(image.data.subarray(from, from + 3), (y * width + x) * 3);
    }
  }
  return { width, height, data };
}

function covering(image, width, height) {
  if (width !== height) {
    const ratio = Math.min(image.height / height, image.width / width);
    return [roundEven(image.width / ratio), roundEven(image.height / ratio)];
  }
  if (image.width <= image.height) return [width, Math.trunc((width * image.height) / image.width)];
  return [Math.trunc((height * image.width) / image.height), height];
}

function crop(image, width, height) {
  const left = roundEven((image.width - width) / 2);
  const top = roundEven((image.height - height) / 2);
  return place(image, width, height, -left, -top, [0, 0, 0]);
}

function pad(image, width, height, color) {
  const left = Math.floor((width - image.width) / 2);
  const top = Math.floor((height - image.height) / 2);
  return place(image, width, height, left, top, color);
}

/** The image on a canvas of a size, its corner at (left, top), which may lie outside. */
function place(image, width, height, left, top, color) {
  const data = new Uint8Array(width * height * 3);
  for (let at = 0; at < data.length; at++) data[at] = color[at % 3];
  const from = Math.max(0, -left), to = Math.min(image.width, width - left);
  for (let y = Math.max(0, -top); y < Math.min(image.height, height - top); y++) {
    const row = image.data.subarray((y * image.width + from) * 3, (y * image.width + to) * 3);
    data.set(row, ((y + top) * width + from + left) * 3);
  }
  return { width, height, data };
}

function normalise({ width, height, data }, { rescale, mean, std }) {
  const size = width * height;
  const pixels = new Float32Array(3 * size);
  for (let channel = 0; channel < 3; channel++) {
    for (let at = 0; at < size; at++) {
      pixels[channel * size + at] = (data[at * 3 + channel] * rescale - mean[channel]) / std[channel];
    }
  }
  return pixels;
}

/** Halves to the even neighbour, as Python's round. */
function roundEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** Halves away from zero. */
function roundAway(value) {
  return Math.trunc(value + (value < 0 ? -0.5 : 0.5));
}
