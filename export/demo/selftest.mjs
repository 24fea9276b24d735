// Replays the bundle's goldens: this browser, on this machine, against the original model.

import { cosines } from "./clip.mjs";

/** Worst cosine of two pictures and of two texts to the original's embeddings, and the verdict. */
export async function selfTest(clip, base) {
  const at = name => new URL(`golden/${name}`, base);
  const golden = await (await fetch(at("golden.json"))).json();
  const worst = { image: 1, text: 1 };
  for (const { pixels, embedding } of golden.images.slice(0, 2)) {
    const found = await clip.encodePixels(await readArray(at(pixels)));
    worst.image = Math.min(worst.image, cosines(await readArray(at(embedding)), found)[0]);
  }
  for (const { ids, embedding } of golden.texts.slice(0, 2)) {
    const found = await clip.encodeIds(ids);
    worst.text = Math.min(worst.text, cosines(await readArray(at(embedding)), found)[0]);
  }
  const passed = Object.entries(worst).every(([tower, cosine]) => cosine >= golden.min_cosine[tower]);
  return { ...worst, passed };
}

/** A .npy file of float32, as numpy writes it. */
async function readArray(address) {
  const buffer = await (await fetch(address)).arrayBuffer();
  const header = new DataView(buffer).getUint16(8, true);
  return new Float32Array(buffer, 10 + header);
}
