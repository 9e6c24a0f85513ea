// The views, and which of them is shown. A view draws its frame once, and `update` follows the address.
// `there` says whether the document has something for the view; a view without it has no link.

const VIEWS = {
  run: { title: "Run", draw: runView },
  groups: { title: "Groups", draw: groupsView, update: updateGroups },
  traces: { title: "Traces", draw: tracesView, update: updateTraces },
  policies: { title: "Policies", draw: policiesView, update: updatePolicies },
  runs: { title: "Runs", draw: runsView, there: () => DOC.runs.length > 1 },
  evidence: { title: "Evidence", draw: evidenceView },
};
const drawn = new Set();
const shownViews = () => Object.fromEntries(Object.entries(VIEWS).filter(([, view]) => !view.there || view.there()));

// Read the address, and show what it names.
function route() {
  const hash = location.hash.slice(1);
  if (hash === "main" && drawn.size) return;
  const found = readAddress();
  if (hash.includes("=")) {
    for (const name of NAMES) at[name] = found[name] ?? DEFAULTS[name] ?? "";
    for (const name of OPEN) if (name in found || belongs(name)) at[name] = found[name] ?? "";
  } else if (hash in VIEWS) {
    at.view = hash;
    history.replaceState(null, "", writeAddress());
  }
  if (!(at.view in shownViews())) at.view = "run";
  const run = DOC.runs[Number(at.run)] ?? DOC.runs[0];
  if (run !== DATA) {
    DATA = run;
    drawn.clear();
  }
  return show(at.view);
}

async function show(name) {
  for (const [key, view] of Object.entries(VIEWS)) {
    const section = document.getElementById(`view-${key}`);
    section.hidden = key !== name;
    const link = document.querySelector(`nav a[href="#${key}"]`);
    if (key === name) link?.setAttribute("aria-current", "page");
    else link?.removeAttribute("aria-current");
    if (key === name && !drawn.has(key)) {
      drawn.add(key);
      section.replaceChildren();
      if (DATA.waiting) section.append(waitingCard());
      else view.draw(section);
    }
    if (key === name) for (const part of [section, document.getElementById("pick-run")]) followAddress(part);
    if (key === name && view.update && !DATA.waiting) await view.update(section);
  }
}

const waitingCard = () =>
  el("section", { class: "card" }, el("h2", {}, "Waiting for the first round"), el("p", {}, foreign(DATA.waiting)));

function pickRun() {
  const names = DOC.runs.map((run, k) => [String(k), visible(run.run.folder)]);
  const field = choice("Run shown", names, at.run, (run) => go({ run, trace: "", token: "", group: "" }));
  Object.assign(field.querySelector("select").dataset, { name: "run", fallback: "0" });
  return field;
}

function start() {
  drawn.clear();
  document.getElementById("warnings").replaceChildren(
    ...DATA.warnings.map((text) => el("section", { class: "card" }, el("p", { class: "stamp bad" }, "✗ warning: ", foreign(text)))),
  );
  const names = DOC.runs.map((run) => visible(run.run.folder)).join(" and ");
  document.title = `${names}: egrsd report`;
  document.getElementById("title").replaceChildren(foreign(names));
  document.querySelector("nav").replaceChildren(...Object.entries(shownViews()).map(([key, { title }]) => el("a", { href: `#${key}` }, title)));
  document.getElementById("pick-run").replaceChildren(
    ...(DOC.runs.length > 1
      ? [pickRun()]
      : []),
  );
  document
    .getElementById("foot")
    .replaceChildren(
      el(
        "p",
        {},
        DOC.live ? "This page follows its run and asks no server but its own. Made from " : "This page is one file and loads nothing from the network. Made from ",
        foreign(DATA.run.called),
        DATA.run.versions.code ? [", code ", foreign(DATA.run.versions.code)] : null,
        ". Entropies and log-probs are in nats, over the full vocabulary, at temperature 1. Signals have three digits. Press ? for keys.",
      ),
    );
  return route();
}

// On paper nothing can be opened, so all chapters are open while the page is printed.
let closed = [];
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll(".chapter:not([open])")];
  for (const chapter of closed) chapter.open = true;
});
window.addEventListener("afterprint", () => {
  for (const chapter of closed) chapter.open = false;
});

Object.assign(at, DEFAULTS, { view: DOC.runs.length > 1 ? "runs" : "run" });
window.addEventListener("hashchange", route);
start().then(() => performance.mark("report-ready"));
if (DOC.live) follow(DOC.version);
