// Small charts. Each is an SVG with a name and a table of its values below. The arrow keys read it out point by point.

const WIDTH = 360;
const HEIGHT = 184;
const PAD = { left: 44, right: 14, top: 12, bottom: 34 };

// Marks of an axis that covers [low, high], in steps of 1, 2 or 5 times a power of ten. Values apart by rounding alone are equal.
function ticks(low, high, wanted = 4) {
  if (!(high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)))) {
    if (low === 0) return ticks(0, 1, wanted);
    const half = Math.abs(low) * 0.1;
    return ticks(low - half, high + half, wanted);
  }
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let k = Math.floor(low / step); k * step < high + step * 0.999; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function scaleOf(values, options) {
  const real = values.filter(known);
  const low = Math.min(...real, options.zero ? 0 : Infinity);
  const high = Math.max(...real, options.zero ? 0 : -Infinity);
  const marks = ticks(options.low ?? low, options.high ?? high);
  const [bottom, top] = [marks[0], marks[marks.length - 1]];
  const y = (value) => HEIGHT - PAD.bottom - ((value - bottom) / (top - bottom)) * (HEIGHT - PAD.top - PAD.bottom);
  return { marks, y, bottom, top };
}

function frame(scale, format) {
  const step = scale.marks[1] - scale.marks[0];
  return scale.marks.map((value) =>
    svg(
      "g",
      { class: "grid" },
      svg("line", { x1: PAD.left, x2: WIDTH - PAD.right, y1: scale.y(value), y2: scale.y(value) }),
      svg("text", { x: PAD.left - 6, y: scale.y(value) + 3.5, "text-anchor": "end" }, format(value, step)),
    ),
  );
}

function xLabels(names, place, title) {
  const every = Math.ceil(names.length / 12);
  return [
    ...names.map((name, i) =>
      i % every === 0 || (i === names.length - 1 && (names.length - 1) % every > every / 2)
        ? svg("text", { class: "tick", x: place(i), y: HEIGHT - 10, "text-anchor": "middle" }, name)
        : null,
    ),
    svg("text", { class: "axis", x: PAD.left - 8, y: HEIGHT - 10, "text-anchor": "end" }, title),
  ];
}

// spec: title, note, names (x labels), xTitle, series [{name, tone, values}], format, zero/low/high.
// kind is "line" or "bars"; bars are stacked.
function chart(spec) {
  const format = spec.format || short;
  const n = spec.names.length;
  const inner = WIDTH - PAD.left - PAD.right;
  const place = (i) =>
    PAD.left + (spec.kind === "bars" ? ((i + 0.5) * inner) / n : n > 1 ? (i * inner) / (n - 1) : inner / 2);
  const stacked = spec.names.map((_, i) =>
    spec.series.reduce((sum, s) => sum + (known(s.values[i]) ? s.values[i] : 0), 0),
  );
  const values = spec.kind === "bars" ? stacked : spec.series.flatMap((s) => s.values);
  const title = el("figcaption", {}, el("h3", {}, spec.title), spec.note ? el("p", {}, spec.note) : null);
  if (!values.some(known))
    return el(
      "figure",
      { class: "card chart" },
      title,
      el("p", { class: "none" }, spec.none || "Not measured in this run."),
    );
  const scale = scaleOf(values, { ...spec, zero: spec.zero || spec.kind === "bars" });
  const cursor = svg("line", { class: "cursor", y1: PAD.top, y2: HEIGHT - PAD.bottom, visibility: "hidden" });
  const marks =
    spec.kind === "bars" ? barMarks(spec, scale, place, inner) : spec.series.map((s) => lineMarks(s, scale, place, n));
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true", focusable: "false" },
    frame(scale, format),
    marks,
    cursor,
    xLabels(spec.names, place, spec.xTitle),
  );
  const readout = el("output", { class: "readout" }, legendText(spec, n - 1, format));
  let now = n - 1;
  const show = (i) => {
    now = Math.min(Math.max(i, 0), n - 1);
    cursor.setAttribute("x1", place(now));
    cursor.setAttribute("x2", place(now));
    cursor.setAttribute("visibility", "visible");
    readout.replaceChildren(...legendText(spec, now, format));
  };
  const plot = el(
    "div",
    {
      class: spec.pick ? "plot picks" : "plot",
      tabindex: "0",
      role: "group",
      "aria-label": `${spec.title}. Chart. The left and right arrow keys read it out.${spec.pick ? " Enter opens the traces." : ""} The table below has all values.`,
      onclick: () => spec.pick?.(now),
      onpointermove: (event) => {
        const box = drawing.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * WIDTH - PAD.left;
        show(spec.kind === "bars" ? Math.floor((x / inner) * n) : Math.round((x / inner) * (n - 1)));
      },
      onpointerleave: () => cursor.setAttribute("visibility", "hidden"),
      onblur: () => cursor.setAttribute("visibility", "hidden"),
      onkeydown: (event) => {
        if (event.key === "Enter") spec.pick?.(now);
        const step = { ArrowLeft: -1, ArrowRight: 1, Home: -n, End: n }[event.key];
        if (!step) return;
        event.preventDefault();
        show(now + step);
      },
    },
    drawing,
  );
  const rows = spec.names.map((name, i) => [name, ...spec.series.map((s) => format(s.values[i]))]);
  return el(
    "figure",
    { class: "card chart" },
    title,
    plot,
    readout,
    tableBelow(spec.title, [spec.xTitle, ...spec.series.map((s) => s.name)], rows),
  );
}

function tableBelow(title, head, rows, options) {
  return el(
    "details",
    { class: "below" },
    el("summary", {}, options?.summary || "Table"),
    table(title, head, rows, { hideCaption: true, ...options }),
  );
}

function legendText(spec, i, format) {
  return [
    el("span", { class: "at" }, `${spec.xTitle} ${spec.names[i]}`),
    ...spec.series.map((s) =>
      el(
        "span",
        { class: `key ${s.tone}` },
        svg("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, keyMark(spec, s)),
        spec.series.length > 1 ? `${s.name} ` : "",
        el("b", {}, format(s.values[i])),
      ),
    ),
  ];
}

const keyMark = (spec, s) =>
  spec.kind === "bars"
    ? [
        svg("rect", { class: `bar ${s.tone}`, x: 4, y: 1, width: 14, height: 8, rx: 1 }),
        hatch(s.tone, { x: 4, y: 1, width: 14, height: 8 }),
      ]
    : svg("line", { class: `line ${s.tone}`, x1: 1, x2: 21, y1: 5, y2: 5 });

function lineMarks(series, scale, place, n) {
  const points = series.values.map((value, i) => (known(value) ? [place(i), scale.y(value)] : null));
  let path = "";
  points.forEach((point, i) => {
    if (point) path += `${i && points[i - 1] ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
  });
  return svg(
    "g",
    {},
    svg("path", { class: `line ${series.tone}`, d: path }),
    n <= 40
      ? points.filter(Boolean).map(([x, y]) => svg("circle", { class: `dot ${series.tone}`, cx: x, cy: y, r: 2.6 }))
      : null,
  );
}

function barMarks(spec, scale, place, inner) {
  const width = Math.max(1, (inner / spec.names.length) * 0.72);
  return spec.names.map((_, i) => {
    let base = 0;
    return spec.series.map((s) => {
      const value = known(s.values[i]) ? s.values[i] : 0;
      const [top, bottom] = [scale.y(base + value), scale.y(base)];
      base += value;
      const box = { x: place(i) - width / 2, y: top, width, height: Math.max(0, bottom - top) };
      return [svg("rect", { class: `bar ${s.tone}`, ...box }), hatch(s.tone, box)];
    });
  });
}

// Strokes over a bar, which tell its series where colours cannot: on paper, in grey, to the colour-blind.
const HATCHED = { "v-wrong": 1, "g-fork": 1, "v-truncated": -1, s1: 1, s3: -1, s5: 1, s7: -1 };
function hatch(tone, { x, y, width, height }) {
  const turn = HATCHED[tone];
  if (!turn || height < 2) return null;
  let path = "";
  for (let from = -height; from < width; from += 5) {
    const [left, right] = [Math.max(0, from), Math.min(width, from + height)];
    const [low, high] = [left - from, right - from].map((d) => (turn > 0 ? y + height - d : y + d));
    path += `M${(x + left).toFixed(1)} ${low.toFixed(1)}L${(x + right).toFixed(1)} ${high.toFixed(1)}`;
  }
  return svg("path", { class: "hatch", d: path });
}

// Accuracy against length. Every run is a point with error bars. The mean of each objective is a larger point.
function frontier(compare) {
  const names = [...new Set(compare.points.map((p) => p.objective))];
  const tone = (name) => `s${names.indexOf(name) % 8}`;
  const [w, h] = [640, 380];
  const pad = { left: 56, right: 20, top: 16, bottom: 44 };
  const means = (compare.objectives || []).filter((o) => known(o?.accuracy?.low) && known(o?.length?.low));
  const all = [...compare.points, ...means];
  const range = (name, most) => [
    Math.max(0, Math.min(...all.map((p) => p[name].low))),
    Math.min(most, Math.max(...all.map((p) => p[name].high))),
  ];
  const xs = ticks(...range("length", Infinity), 6);
  const ys = ticks(...range("accuracy", 1), 5);
  const within = (v, marks) => Math.min(Math.max(v, marks[0]), marks[marks.length - 1]); // an interval may exceed the possible values
  const x = (v) => pad.left + ((within(v, xs) - xs[0]) / (xs[xs.length - 1] - xs[0])) * (w - pad.left - pad.right);
  const y = (v) =>
    h - pad.bottom - ((within(v, ys) - ys[0]) / (ys[ys.length - 1] - ys[0])) * (h - pad.top - pad.bottom);
  const cross = (p, strong) =>
    svg(
      "g",
      { class: `cross ${tone(p.objective)}${strong ? " strong" : ""}` },
      svg(
        "title",
        {},
        visible(
          `${p.objective}${known(p.seed) ? `, seed ${p.seed}` : ", mean"}: ${percent(p.accuracy.value)}, ${fixed(p.length.value, 1)} tokens`,
        ),
      ),
      svg("line", { x1: x(p.length.low), x2: x(p.length.high), y1: y(p.accuracy.value), y2: y(p.accuracy.value) }),
      svg("line", { x1: x(p.length.value), x2: x(p.length.value), y1: y(p.accuracy.low), y2: y(p.accuracy.high) }),
      shape(names.indexOf(p.objective), x(p.length.value), y(p.accuracy.value), strong ? 7 : 3.6),
    );
  const drawing = svg(
    "svg",
    {
      viewBox: `0 0 ${w} ${h}`,
      role: "img",
      "aria-label": "Accuracy against mean length. The table below has the values.",
    },
    xs.map((v) =>
      svg(
        "g",
        { class: "grid" },
        svg("line", { x1: x(v), x2: x(v), y1: pad.top, y2: h - pad.bottom }),
        svg("text", { x: x(v), y: h - pad.bottom + 16, "text-anchor": "middle" }, short(v)),
      ),
    ),
    ys.map((v) =>
      svg(
        "g",
        { class: "grid" },
        svg("line", { x1: pad.left, x2: w - pad.right, y1: y(v), y2: y(v) }),
        svg("text", { x: pad.left - 8, y: y(v) + 4, "text-anchor": "end" }, percent(v, ys[1] - ys[0] < 0.01 ? 1 : 0)),
      ),
    ),
    svg("text", { class: "axis", x: w - pad.right, y: h - 6, "text-anchor": "end" }, "mean length, tokens"),
    svg("text", { class: "axis", x: pad.left, y: pad.top - 4 }, "accuracy"),
    compare.points.map((p) => cross(p, false)),
    means.map((o) => cross(o, true)),
  );
  const legend = el(
    "ul",
    { class: "legend" },
    names.map((name, i) =>
      el(
        "li",
        {},
        svg(
          "svg",
          { viewBox: "0 0 18 18", "aria-hidden": "true", class: `cross strong ${tone(name)}` },
          shape(i, 9, 9, 6),
        ),
        foreign(name),
      ),
    ),
  );
  return el("div", { class: "wide plot" }, drawing, legend);
}

// Objectives differ in shape as well as in colour.
function shape(index, x, y, r) {
  const polygon = (turn, sides, inner = 1) => {
    const at = [];
    for (let k = 0; k < sides; k += 1) {
      const size = r * 1.2 * (inner < 1 && k % 2 ? inner : 1);
      const angle = turn + (2 * Math.PI * k) / sides;
      at.push(`${(x + size * Math.sin(angle)).toFixed(2)},${(y - size * Math.cos(angle)).toFixed(2)}`);
    }
    return svg("polygon", { points: at.join(" ") });
  };
  const shapes = [
    () => svg("circle", { cx: x, cy: y, r }),
    () => polygon(Math.PI / 4, 4),
    () => polygon(0, 3),
    () => polygon(0, 4),
    () => polygon(Math.PI, 3),
    () => polygon(0, 10, 0.45),
    () => polygon(0, 5),
    () => polygon(0, 8, 0.4),
  ];
  return shapes[(index + 3 * Math.floor(index / shapes.length)) % shapes.length](); // colours repeat after eight objectives, pairs of shape and colour do not
}
