// A text to token ids, as `tokenizer` of bundle.json states it.

import { Tokenizer } from "./tokenizers.min.mjs";

// What Python's str.split splits at: JavaScript's \s without the byte order mark, and five more.
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;

/** A function from a text to the ids of its whole context, padding included. */
export async function openTokenizer(spec, address) {
  const file = await (await fetch(address)).json();
  const ownMarks = spec.start_id === null;
  // Cutting and filling up are done here; the file's own settings serve readers without bundle.json.
  const tokenizer = new Tokenizer({ ...file, truncation: null, padding: null }, {});
  return text => {
    let ids = tokenizer.encode(clean(text, spec), { add_special_tokens: ownMarks }).ids;
    if (ownMarks) ids = cut(ids, spec);
    else ids = [spec.start_id, ...ids.slice(0, spec.context_length - 2), spec.end_id];
    return [...ids, ...Array(spec.context_length - ids.length).fill(spec.pad_id)];
  };
}

/** White space joined, letters lowered where the model wants it. */
export function clean(text, spec) {
  const joined = text.split(SPACES).filter(Boolean).join(" ");
  return spec.lowercase ? joined.toLowerCase() : joined;
}

/** An over-long text loses its last ids, never its end mark. */
function cut(ids, spec) {
  if (ids.length <= spec.context_length) return ids;
  return [...ids.slice(0, spec.context_length - 1), spec.end_id];
}
