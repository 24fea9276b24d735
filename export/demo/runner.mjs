// What a test or a benchmark drives: towers of /bundle/ without any page around them.

import { openBundle } from "./clip.mjs";

let clip, queries, next = 0;

/** Load the towers; {load_ms, first_ms} or {unavailable}. */
async function open({ module, provider, threads, towers, bundle }) {
  const ort = await import(module);
  let adapter;
  if (provider === "webgpu") {
    adapter = await navigator.gpu?.requestAdapter();
    if (!adapter) return { unavailable: "this browser has no WebGPU adapter" };
  }
  if (threads > 1 && !crossOriginIsolated) {
    return { unavailable: "threads need a page isolated from other origins (COOP and COEP)" };
  }
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = "/ort/";
  ort.env.logLevel = "error";
  const start = performance.now();
  clip = await openBundle(ort, new URL("/bundle/", location.href), { provider, towers, bundle });
  return {
    load_ms: performance.now() - start,
    software: Boolean(adapter?.info.isFallbackAdapter),
    agent: navigator.userAgent,
  };
}

/** One input (base64 of float32 pixels or int32 ids) -> its embedding as base64. */
async function encode(tower, text) {
  return pack(await call(tower)(unpack(tower, text)));
}

/**
 * What `run` turns through: inputs as base64, or where `raw` is true addresses of pictures and
 * sentences, as an application meets them; {first_ms}.
 */
async function prepare(tower, inputs, raw) {
  const blob = async address => (await fetch(address)).blob();
  if (!raw) queries = { call: call(tower), rows: inputs.map(text => unpack(tower, text)) };
  else if (tower === "text") queries = { call: clip.encodeText, rows: inputs };
  else queries = { call: clip.encodeImage, rows: await Promise.all(inputs.map(blob)) };
  next = 0;
  return { first_ms: (await run(1, 1e9))[0] };
}

/** Milliseconds of up to `count` queries, stopping after `limit` milliseconds. */
async function run(count, limit) {
  const samples = [], end = performance.now() + limit;
  while (samples.length < count && (!samples.length || performance.now() < end)) {
    const row = queries.rows[next++ % queries.rows.length];
    const start = performance.now();
    await queries.call(row);
    samples.push(performance.now() - start);
  }
  return samples;
}

/** What the page makes of a picture and of a text: for comparing with the contract. */
async function pixels(address) {
  return pack(await clip.readPixels(await (await fetch(address)).blob()));
}

async function ids(text) {
  return clip.tokenize(text);
}

function call(tower) {
  return tower === "image" ? clip.encodePixels : clip.encodeIds;
}

function unpack(tower, text) {
  const { buffer } = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  return tower === "image" ? new Float32Array(buffer) : new Int32Array(buffer);
}

function pack(values) {
  const bytes = new Uint8Array(values.buffer);
  let text = "";
  for (let at = 0; at < bytes.length; at += 4096) {
    text += String.fromCharCode(...bytes.subarray(at, at + 4096));
  }
  return btoa(text);
}

globalThis.runner = { open, encode, prepare, run, pixels, ids };
