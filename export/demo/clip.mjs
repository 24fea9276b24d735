// Both towers of a bundle in onnxruntime-web. Shapes: E embedding.

import { readPixels } from "./pixels.mjs";
import { openTokenizer } from "./tokens.mjs";

/**
 * Open the bundle at an address that ends with a slash.
 * ort: the module onnxruntime-web. towers: which to open. provider: "wasm" or "webgpu".
 * bundle: bundle.json, fetched unless given.
 */
export async function openBundle(ort, base, { provider = "wasm", towers = ["image", "text"], bundle } = {}) {
  bundle ??= await (await fetch(new URL("bundle.json", base))).json();
  const runs = {};
  for (const tower of towers) runs[tower] = await openTower(ort, base, bundle[tower], provider);
  const tokenize = await openTokenizer(bundle.tokenizer, new URL(bundle.tokenizer.file, base));
  return {
    bundle,
    tokenize,
    readPixels: blob => readPixels(blob, bundle.preprocess),
    /** float32 [3, H, W] -> float32 [E], unit length. */
    encodePixels: pixels => runs.image(pixels),
    /** ids -> float32 [E], unit length. */
    encodeIds: ids => runs.text(ids),
    /** A picture as Blob -> float32 [E]. */
    encodeImage: async blob => runs.image(await readPixels(blob, bundle.preprocess)),
    /** A text -> float32 [E]; without its padding, where the model doesn't see it. */
    encodeText: text => runs.text(trimmed(tokenize(text), bundle)),
  };
}

/** A function from one input to its embedding; calls wait for each other. */
async function openTower(ort, base, entry, provider) {
  const address = new URL(entry.file, base);
  const session = await ort.InferenceSession.create(address.href, {
    executionProviders: [provider],
    graphOptimizationLevel: "all",
    freeDimensionOverrides: { batch: 1 },
  });
  const { name, dtype, shape } = entry.input;
  let last = Promise.resolve();
  return values => {
    const run = async () => {
      const own = shape.length === 2 ? [1, values.length] : shape;
      const input = new ort.Tensor(dtype, asArray(values, dtype), own);
      const output = (await session.run({ [name]: input }))[entry.output.name];
      return Float32Array.from(await output.getData());
    };
    return (last = last.then(run, run));
  };
}

function asArray(values, dtype) {
  if (dtype === "int64") return BigInt64Array.from(values, BigInt);
  return dtype === "int32" ? Int32Array.from(values) : Float32Array.from(values);
}

/** Ids up to the end mark, where the bundle says that its text tower takes any length. */
function trimmed(ids, { runtime, tokenizer }) {
  return runtime?.any_text_length ? ids.slice(0, ids.indexOf(tokenizer.end_id) + 1) : ids;
}

/** Cosines of rows [N, E], one after the other, with one embedding [E]; all of unit length. */
export function cosines(rows, embedding) {
  const width = embedding.length;
  const found = new Float32Array(rows.length / width);
  for (let row = 0, at = 0; row < found.length; row++) {
    let sum = 0;
    for (let column = 0; column < width; column++) sum += rows[at++] * embedding[column];
    found[row] = sum;
  }
  return found;
}

/** Indices of the k largest values, the largest first. */
export function largest(values, k) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a]).slice(0, k);
}
