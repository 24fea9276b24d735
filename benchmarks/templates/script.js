// Tooltips for everything with data-tip, by mouse and by keyboard, and the theme button.
(() => {
  const tip = document.getElementById("tip");
  const show = (target) => {
    tip.textContent = target.dataset.tip;
    const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = box.top - own.height - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : box.bottom + 8) + scrollY}px`;
    tip.style.visibility = "visible";
  };
  const hide = () => { tip.style.visibility = "hidden"; };
  const explain = (target) => {
    target.tabIndex = 0;
    target.addEventListener("mouseenter", () => show(target));
    target.addEventListener("focus", () => show(target));
    target.addEventListener("mouseleave", hide);
    target.addEventListener("blur", hide);
  };
  document.querySelectorAll("[data-tip]").forEach(explain);
  const download = (name, url) => { const a = document.createElement("a"); a.href = url; a.download = name; a.click(); };
  const csv = (name, lines) => {
    const cell = (value) => `"${String(value ?? "").replaceAll('"', '""').trim()}"`;
    const text = lines.map((line) => line.map(cell).join(",")).join("\r\n");
    download(name, URL.createObjectURL(new Blob([text], { type: "text/csv" })));
  };
  // An image of its own knows no style sheet: the computed styles go into a copy.
  const png = (svg) => {
    const copy = svg.cloneNode(true), from = svg.querySelectorAll("*"), to = copy.querySelectorAll("*");
    const keys = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "font", "text-anchor", "paint-order"];
    from.forEach((node, i) => { const seen = getComputedStyle(node); for (const key of keys) to[i].style.setProperty(key, seen.getPropertyValue(key)); });
    const { width, height } = svg.viewBox.baseVal, image = new Image(), canvas = document.createElement("canvas");
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg"); copy.setAttribute("width", width); copy.setAttribute("height", height);
    canvas.width = 2 * width; canvas.height = 2 * height;
    image.onload = () => {
      const pen = canvas.getContext("2d");
      pen.fillStyle = getComputedStyle(svg.closest(".card")).backgroundColor;
      pen.fillRect(0, 0, canvas.width, canvas.height); pen.drawImage(image, 0, 0, canvas.width, canvas.height);
      download(`${(svg.getAttribute("aria-label") || "plot").replaceAll(/\W+/g, "-")}.png`, canvas.toDataURL("image/png"));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  };
  for (const svg of document.querySelectorAll(".card > svg")) {
    const button = document.createElement("button");
    button.type = "button"; button.className = "png"; button.textContent = "PNG"; button.title = "Save this plot as an image";
    button.addEventListener("click", () => png(svg));
    svg.before(button);
  }
  for (const button of document.querySelectorAll("[data-table]")) button.addEventListener("click", () => {
    const lines = [...document.getElementById(button.dataset.table).rows];
    let name = "";
    csv(`${button.dataset.table}.csv`, lines.map((line) => [...line.cells].map((cell, i) => {
      const text = cell.textContent.trim();
      if (i === 0) name = text || name;
      return i === 0 ? name : text;
    })));
  });
  const root = document.documentElement, button = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();

  // The plot with filters: all rows are in the page, everything else is drawn here.
  const card = document.getElementById("explorer");
  if (!card) return;
  const data = JSON.parse(document.getElementById("rows").textContent), svg = card.querySelector("svg");
  const W = 1160, H = 420, LEFT = 72, RIGHT = W - 24, TOP = 20, BOTTOM = H - 52;
  const make = (parent, tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  };
  const axis = (name) => card.querySelector(`[data-axis=${name}]`);
  const short = (value) => Number(value.toPrecision(3)).toString();
  const isCosine = (key) => key.includes("cosine"), shownY = (key, v) => isCosine(key) ? v.toFixed(4) : `${(100 * v).toFixed(1)} %`;
  const chosen = () => {
    const selects = [...card.querySelectorAll("[data-filter]")], boxes = [...card.querySelectorAll("[data-keep]")];
    return data.rows.filter((row) => row[axis("x").value] != null && row[axis("y").value] != null
      && selects.every((s) => String(row[s.dataset.filter]) === s.value)
      && boxes.every((b) => b.checked || String(row[b.dataset.keep]) !== b.value));
  };
  const ticks = (low, high) => {
    const step = 10 ** Math.floor(Math.log10((high - low) / 4)), round = [1, 2, 5, 10].map((m) => m * step).find((s) => (high - low) / s <= 8);
    const found = [];
    for (let v = Math.ceil(low / round) * round; v <= high; v += round) found.push(v);
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) for (const m of [1, 2, 5]) found.push(m * 10 ** p);
    return found.filter((v) => v >= low && v <= high);
  };
  // The nearest free place for a label: right or left of its point, moved up or down in steps.
  const labelled = (cx, cy, label, used) => {
    const wide = 7.4 * label.length;
    for (let step = 0; step < 60; step++) {
      const at = cy + 4 + (step % 2 ? 1 : -1) * Math.ceil(step / 2) * 9;
      if (at < TOP || at > BOTTOM - 4) continue;
      for (const left of cx + 20 + wide > W ? [true, false] : [false, true]) {
        const from = left ? cx - 12 - wide : cx + 12, to = from + wide;
        const free = from >= LEFT && to <= W && used.every(([a, b, y]) => b < from || a > to || Math.abs(y - at) > 16);
        if (free) return { left, from, to, at };
      }
    }
    return { left: false, from: cx + 12, to: cx + 12 + wide, at: cy + 4 };
  };
  const draw = () => {
    const rows = chosen(), x = axis("x").value, y = axis("y").value, log = card.querySelector("[data-log]").checked;
    svg.replaceChildren();
    if (!rows.length) { make(svg, "text", { x: W / 2, y: H / 2, "text-anchor": "middle", class: "soft" }, "No artifact was measured like this."); return; }
    const xs = rows.map((r) => r[x]), ys = rows.map((r) => r[y]), pad = Math.max(isCosine(y) ? 1e-4 : 0.02, 0.15 * (Math.max(...ys) - Math.min(...ys)));
    const lowX = log ? Math.min(...xs) / 1.4 : 0, highX = log ? Math.max(...xs) * 1.7 : Math.max(...xs) * 1.2;
    const lowY = isCosine(y) ? Math.min(...ys) - pad : Math.max(0, Math.min(...ys) - pad), highY = Math.min(isCosine(y) ? 1.0005 : 1, Math.max(...ys) + pad);
    const f = log ? Math.log : (v) => v;
    const px = (v) => LEFT + (f(v) - f(lowX)) / (f(highX) - f(lowX)) * (RIGHT - LEFT), py = (v) => BOTTOM - (v - lowY) / (highY - lowY) * (BOTTOM - TOP);
    for (const v of ticks(lowY, highY)) {
      make(svg, "line", { class: "grid", x1: LEFT, x2: RIGHT, y1: py(v), y2: py(v) });
      make(svg, "text", { class: "soft", x: LEFT - 10, y: py(v) + 4, "text-anchor": "end" }, isCosine(y) ? v.toFixed(3) : `${Math.round(1000 * v) / 10} %`);
    }
    for (const v of log ? logTicks(lowX, highX) : ticks(lowX, highX)) {
      make(svg, "line", { class: "grid", x1: px(v), x2: px(v), y1: TOP, y2: BOTTOM });
      make(svg, "text", { class: "soft", x: px(v), y: BOTTOM + 18, "text-anchor": "middle" }, short(v));
    }
    make(svg, "line", { class: "axis", x1: LEFT, x2: RIGHT, y1: BOTTOM, y2: BOTTOM });
    make(svg, "text", { class: "soft", x: (LEFT + RIGHT) / 2, y: H - 10, "text-anchor": "middle" }, data.x[x]);
    make(svg, "text", { class: "soft", x: LEFT + 8, y: TOP + 14 }, "↖ better");
    const best = [];
    for (const row of [...rows].sort((a, b) => a[x] - b[x] || b[y] - a[y])) if (!best.length || row[y] > best.at(-1)[y]) best.push(row);
    make(svg, "polyline", { class: "frontier", points: best.map((r) => `${px(r[x])},${py(r[y])}`).join(" ") });
    // Labels keep off each other and off all points.
    const used = rows.map((r) => [px(r[x]) - 9, px(r[x]) + 9, py(r[y]) + 4]);
    for (const row of [...rows].sort((a, b) => b[y] - a[y])) {
      const about = Object.keys(data.filters).filter((k) => data.filters[k].length > 1 && !["target", "precision"].includes(k)).map((k) => row[k]).join(", ");
      const group = make(svg, "g", { class: `k${row.color}` }), cx = px(row[x]), cy = py(row[y]);
      const { left, from, to, at } = labelled(cx, cy, row.label, used);
      used.push([from, to, at]);
      if (Math.abs(at - cy - 4) > 12) make(group, "line", { class: "leader", x1: cx, y1: cy, x2: cx + (left ? -12 : 12), y2: at - 4 });
      group.dataset.tip = [row.label, about, `${data.y[y]}: ${shownY(y, row[y])}`, ...Object.keys(data.x).filter((k) => row[k] != null).map((k) => `${data.x[k]}: ${short(row[k])}`), row.path].filter(Boolean).join("\n");
      make(group, "circle", { class: "fill", cx, cy, r: 7 });
      make(group, "text", { class: "tag", x: cx + (left ? -12 : 12), y: at, "text-anchor": left ? "end" : "start" }, row.label);
      group.addEventListener("click", () => { location.href = `${row.path}/`; });
      explain(group);
    }
  };
  card.addEventListener("change", draw);
  card.querySelector("[data-csv]").addEventListener("click", () => {
    const keys = ["label", ...Object.keys(data.filters), ...Object.keys(data.x), ...Object.keys(data.y), "path"];
    csv("artifacts-chosen.csv", [keys, ...chosen().map((row) => keys.map((key) => row[key]))]);
  });
  draw();
})();
