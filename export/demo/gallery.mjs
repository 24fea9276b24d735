// Sets of pictures to search in: the embedded one, and folders of the user.

const READABLE = /\.(avif|bmp|gif|jpe?g|png|svg|webp)$/i;

/** The embedded pictures as a list of one source, or of none. */
export async function openGallery(base) {
  const at = name => new URL(`demo/${name}`, base);
  const about = await (await fetch(at("gallery.json"))).json();
  if (!about.pictures.length) return [];
  const files = await (await fetch(at("gallery.bin"))).blob();
  const rows = await (await fetch(at("gallery.f32"))).arrayBuffer();
  const blobs = about.pictures.map(({ at, size }) => files.slice(at, at + size, "image/webp"));
  const names = about.pictures.map(picture => picture.name);
  const title = about.credits.length ? "Emoji" : "Embedded pictures";
  return [source(title, names, blobs, new Float32Array(rows), about.credits)];
}

/** Embed every readable picture among files; `progress(done, all)` is told of each. */
export async function addFolder(clip, files, progress) {
  const pictures = files.filter(file => READABLE.test(file.name));
  const names = [], blobs = [], rows = [];
  let unreadable = 0;
  for (const [index, file] of pictures.entries()) {
    progress(index + 1, pictures.length);
    await new Promise(requestAnimationFrame); // the page stays alive
    try {
      rows.push(await clip.encodeImage(file));
    } catch {
      unreadable++;
      continue;
    }
    names.push(file.name);
    blobs.push(file);
  }
  const width = clip.bundle.model.embed_dim;
  const embeddings = new Float32Array(rows.length * width);
  rows.forEach((row, index) => embeddings.set(row, index * width));
  const title = files[0]?.webkitRelativePath?.split("/")[0] || "Folder";
  return { ...source(title, names, blobs, embeddings, []), unreadable };
}

function source(title, names, blobs, embeddings, credits) {
  const addresses = new Map();
  const width = embeddings.length / names.length;
  return {
    title,
    credits,
    embeddings,
    size: names.length,
    chosen: true,
    name: index => names[index],
    /** The picture of a name, or the first. */
    find: name => blobs[Math.max(0, names.indexOf(name))],
    embedding: index => embeddings.subarray(index * width, (index + 1) * width),
    address: index => {
      if (!addresses.has(index)) addresses.set(index, URL.createObjectURL(blobs[index]));
      return addresses.get(index);
    },
  };
}
