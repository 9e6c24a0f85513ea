// The address of the page names the open view: #traces, #run, #evidence, #trace=ID&token=12.

const VIEWS = { traces: tracesView, run: runView, evidence: evidenceView };
const drawn = new Set();

function show(name) {
  for (const key of Object.keys(VIEWS)) {
    document.getElementById(`view-${key}`).hidden = key !== name;
    const link = document.querySelector(`nav a[href="#${key}"]`);
    if (key === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!drawn.has(name)) {
    drawn.add(name);
    VIEWS[name](document.getElementById(`view-${name}`));
  }
}

function route() {
  const found = new URLSearchParams(location.hash.slice(1));
  const trace = DATA.sample.traces.find((t) => t.id === found.get("trace"));
  if (trace) {
    show("traces");
    openTrace(trace, /^\d+$/.test(found.get("token") ?? "") ? Number(found.get("token")) : null);
    return;
  }
  const name = location.hash.slice(1);
  if (name === "main" && drawn.size) return;
  show(name in VIEWS ? name : "traces");
  if (!view.trace && view.list.length) openTrace(view.list[0], null);
}

document
  .getElementById("main")
  .prepend(
    ...DATA.warnings.map((text) =>
      el("section", { class: "card" }, el("p", { class: "stamp bad" }, "✗ warning: ", foreign(text))),
    ),
  );
document.title = visible(`${DATA.run.folder}: egrsd report`);
document.getElementById("title").replaceChildren(foreign(DATA.run.folder));
document
  .getElementById("foot")
  .append(
    el(
      "p",
      {},
      "This page is one file and loads nothing from the network. Recipe ",
      foreign(DATA.run.name),
      DATA.run.versions.code ? [", code ", foreign(DATA.run.versions.code)] : null,
      ". Entropies and log-probs are in nats, over the full vocabulary, at temperature 1. Signals have three digits.",
    ),
  );
window.addEventListener("hashchange", route);
route();
performance.mark("report-ready");
