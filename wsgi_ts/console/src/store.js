// The connection to the server, and what has come over it: the last minutes of snapshots, and series made of them.
import { added, less, modelKey, modelRates, percentile, total, within } from "./numbers.js";

const KEEP = 600;
const WINDOW_S = 10;
const SMOOTH_S = 3;
const KEY = "wsgi-ts-key";

export const state = {
  phase: "connecting", // live, lost, login, paused, refused
  message: "",
  snapshots: [],
  series: emptySeries(),
  sloUs: Number(localStorage.getItem("wsgi-ts-slo")) || 100000,
  key: sessionStorage.getItem(KEY) ?? "",
  inferenceKey: sessionStorage.getItem(`${KEY}-inference`) ?? "",
};
const listeners = new Set();
let following = null;
let isStarted = false;

export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function changed() {
  for (const listener of listeners) listener();
}

function emptySeries() {
  return { t: [], ok: [], client: [], server: [], p50: [], p99: [], good: [], queue: [], running: [], answered: [] };
}

export const latest = () => state.snapshots.at(-1);

/** The snapshot of so many seconds ago, or the first there is. */
export function earlier(seconds) {
  const now = latest();
  const found = state.snapshots.findLast((each) => now.at - each.at >= seconds - 0.5);
  return found ?? state.snapshots[0];
}

export function setSlo(us) {
  state.sloUs = us;
  localStorage.setItem("wsgi-ts-slo", String(us));
  const all = state.snapshots;
  state.series = emptySeries();
  state.snapshots = [];
  for (const each of all) take(each, true);
  changed();
}

export function setKey(key, inferenceKey) {
  state.key = key;
  sessionStorage.setItem(KEY, key);
  if (inferenceKey != null) {
    state.inferenceKey = inferenceKey;
    sessionStorage.setItem(`${KEY}-inference`, inferenceKey);
  }
  if (isStarted) restart();
  else changed();
}

/** Asks for another key than the one that is there. */
export function signIn() {
  following?.abort();
  state.phase = "login";
  changed();
}

/** A call of the management API; an answer that says that a key is missing leads to the login. */
export async function call(method, path, options = {}) {
  const headers = { ...options.headers };
  if (state.key) headers.authorization = `Bearer ${state.key}`;
  const answer = await fetch(path, { method, cache: "no-store", ...options, headers });
  if (answer.status >= 400 && (await asksForKey(answer))) {
    state.phase = "login";
    state.message = "";
    changed();
  }
  return answer;
}

/** Whether a key is missing or does not count. Who must not do something (403) is told so, and keeps the key. */
async function asksForKey(answer) {
  if (answer.status === 401) return true;
  if (answer.status !== 400) return false;
  const said = await answer.clone().json().catch(() => ({}));
  return said.type === "InvalidKeyException";
}

export async function json(path) {
  const answer = await call("GET", path);
  if (!answer.ok) throw await failure(answer);
  return answer.json();
}

/** What the server says of an answer that is none. */
async function failure(answer) {
  const said = await answer.json().catch(() => ({}));
  const error = new Error(said.message ?? `The server answers ${answer.status} ${answer.statusText}.`);
  error.status = answer.status;
  return error;
}

function take(snapshot, quiet = false) {
  const before = latest();
  if (before && (snapshot.server.uptime_s < before.server.uptime_s || snapshot.server.pid !== before.server.pid)) {
    state.snapshots = [];
    state.series = emptySeries();
  }
  state.snapshots.push(snapshot);
  if (state.snapshots.length > 1) addPoint(snapshot);
  if (state.snapshots.length > KEEP) state.snapshots.shift();
  if (!quiet) changed();
}

/** What clients see: models of their own, and workflows; not the nodes of workflows. */
function fronts(snapshot) {
  const own = snapshot.models.filter((model) => !model.workflow);
  return new Map([
    ...own.map((model) => [`m ${modelKey(model)}`, model.latency]),
    ...snapshot.workflows.map((workflow) => [`w ${workflow.name}`, workflow.latency]),
  ]);
}

export function overview(seconds) {
  const now = latest();
  const before = earlier(seconds);
  const passed = Math.max(0.001, now.at - before.at);
  const old = fronts(before);
  const latency = added([...fronts(now)].map(([name, counts]) => less(counts, old.get(name))));
  const gone = (name) => Math.max(0, now.answers[name] - before.answers[name]) / passed;
  const answered = total(latency) / passed;
  const server = gone("5xx");
  const good = within(latency, now.time_bounds_us, state.sloUs) / passed;
  return {
    answered,
    ok: gone("2xx"),
    client: gone("4xx"),
    server,
    p50: percentile(latency, now.time_bounds_us, 0.5),
    p99: percentile(latency, now.time_bounds_us, 0.99),
    good: Math.max(0, good - server),
    queue: now.models.reduce((sum, model) => sum + model.queued, 0),
    running: now.models.reduce((sum, model) => sum + Math.max(0, model.outstanding - model.queued), 0),
  };
}

function addPoint(snapshot) {
  const quick = overview(SMOOTH_S);
  const steady = overview(WINDOW_S);
  const { series } = state;
  const point = { ...quick, p50: steady.p50, p99: steady.p99, t: snapshot.at };
  for (const name of Object.keys(series)) {
    series[name].push(point[name]);
    if (series[name].length > KEEP) series[name].shift();
  }
}

/** Of each model version what it has done in the last seconds, by `modelKey`. */
export function rates(seconds = WINDOW_S) {
  const now = latest();
  const before = earlier(seconds);
  const old = new Map(before.models.map((model) => [modelKey(model), model]));
  const passed = Math.max(0.001, now.at - before.at);
  const first = now === before;
  return new Map(
    now.models.map((model) => {
      const key = modelKey(model);
      const since = first ? model : old.get(key);
      return [key, modelRates(model, since, passed, now.time_bounds_us)];
    }),
  );
}

export function workflowRates(workflow, seconds = WINDOW_S) {
  const now = latest();
  const before = earlier(seconds);
  const passed = Math.max(0.001, now.at - before.at);
  const old = before.workflows.find((each) => each.name === workflow.name);
  const latency = less(workflow.latency, old?.latency);
  return {
    rps: total(latency) / passed,
    p50: percentile(latency, now.time_bounds_us, 0.5),
    p99: percentile(latency, now.time_bounds_us, 0.99),
    nodes: new Map(
      workflow.nodes.map((node) => {
        const was = old?.nodes.find((each) => each.name === node.name);
        const runs = Math.max(0, (node.runs ?? 0) - (was?.runs ?? 0));
        const tookUs = Math.max(0, (node.took_us ?? 0) - (was?.took_us ?? 0));
        return [node.name, { rps: runs / passed, ms: runs ? tookUs / runs / 1000 : null }];
      }),
    ),
  };
}

/** Follows the server for as long as the page can be seen. */
export function start() {
  isStarted = true;
  document.addEventListener("visibilitychange", () => (document.hidden ? pause() : restart()));
  restart();
}

function pause() {
  following?.abort();
  following = null;
  state.phase = "paused";
}

function restart() {
  following?.abort();
  following = new AbortController();
  state.phase = "connecting";
  changed();
  void follow(following.signal);
}

async function follow(signal) {
  let wait = 500;
  while (!signal.aborted) {
    try {
      const answer = await call("GET", "/console/events", { signal, headers: { accept: "text/event-stream" } });
      if (state.phase === "login") return;
      if (!answer.ok) throw await failure(answer);
      const events = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await events.read();
        if (done) break;
        text += value;
        const parts = text.split("\n\n");
        text = parts.pop();
        for (const part of parts) onEvent(part);
        wait = 500;
      }
      if (!signal.aborted) await sleep(wait);
    } catch (error) {
      if (signal.aborted) return;
      state.phase = error.status === 403 ? "refused" : "lost";
      state.message = error instanceof TypeError ? "The server does not answer." : error.message;
      changed();
      await sleep(wait);
      wait = Math.min(8000, wait * 2);
    }
  }
}

function onEvent(text) {
  const lines = text.split("\n");
  const kind = lines.find((line) => line.startsWith("event: "))?.slice(7);
  const data = JSON.parse(lines.find((line) => line.startsWith("data: "))?.slice(6) ?? "null");
  if (kind === "snapshot") {
    state.phase = "live";
    state.message = "";
    take(whole(data));
  } else if (kind === "unavailable") {
    state.phase = "lost";
    state.message = data.message;
    changed();
  }
}

/** A snapshot with all models: what it does not bring, of a model some facts or the whole model, has not changed. */
function whole(snapshot) {
  const known = new Map((latest()?.models ?? []).map((model) => [model.id, model]));
  for (const model of snapshot.models) known.set(model.id, { ...known.get(model.id), ...model });
  return { ...snapshot, models: snapshot.order.map((id) => known.get(id)) };
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
