// The address names all that is chosen: #run, or #view=traces&round=3&verdict=wrong&order=longest&q=wait&trace=ID&token=12.

const NAMES = ["view", "run", "round", "verdict", "outcome", "order", "grouped", "q", "colour", "a", "b", "moved", "sorted"];
const OPEN = ["problem", "group", "trace", "token"]; // what is looked at; these stand at the end
const DEFAULTS = { view: "run", run: "0", order: "round", grouped: "spread", colour: "", moved: "", sorted: "moved" };
const at = {};

function readAddress() {
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) return { ...at, ...(hash in VIEWS ? { view: hash } : {}) };
  const found = Object.fromEntries(new URLSearchParams(hash));
  const implied = "trace" in found ? "traces" : "group" in found ? "groups" : "problem" in found ? "policies" : undefined;
  const run = found.run ?? (found.trace && runOf(found.trace));
  return { ...found, view: found.view in VIEWS ? found.view : implied, run };
}

// The run of a trace, for an address that names none.
const runOf = (id) => {
  const found = DOC.runs.findIndex((run) => run.traces.some((trace) => trace.id === id));
  return found > 0 ? String(found) : undefined;
};

function writeAddress() {
  const implied = at.view === "traces" && at.trace;
  const named = [...NAMES, ...OPEN].filter(
    (name) => at[name] && at[name] !== (DEFAULTS[name] ?? "") && !(name === "view" && implied) && belongs(name),
  );
  if (!named.length || (named.length === 1 && named[0] === "view")) return `#${at.view}`;
  if (!named.includes("view") && !implied) named.unshift("view");
  return `#${named.map((name) => `${name}=${encodeURIComponent(at[name])}`).join("&")}`;
}

// What another view looks at is kept in mind, but not in the address.
function belongs(name) {
  const owner = { trace: "traces", token: "traces", group: "groups", problem: "policies" }[name];
  return !owner || owner === at.view;
}

// Change what is chosen. push: a new entry of the history, so that the way back leads here.
function go(changes, { push = false } = {}) {
  for (const [name, value] of Object.entries(changes)) at[name] = value ?? "";
  const hash = writeAddress();
  if (hash === location.hash) return route();
  if (push) location.hash = hash;
  else {
    history.replaceState(null, "", hash);
    route();
  }
}
