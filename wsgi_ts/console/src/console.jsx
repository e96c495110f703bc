// The console: the frame around the panels, and which of them is shown.
import { render } from "preact";
import { useLayoutEffect, useState } from "preact/hooks";
import { clock } from "./format.js";
import { Gpus } from "./gpus.jsx";
import { Models } from "./models.jsx";
import { Overview } from "./overview.jsx";
import { Icon, Toasts, useStore } from "./parts.jsx";
import { Requests } from "./requests.jsx";
import { Settings } from "./settings.jsx";
import { latest, setKey, signIn, start, state } from "./store.js";
import { applyTheme, ThemeButton } from "./theme.jsx";
import { TryIt } from "./try.jsx";
import { Tune } from "./tune.jsx";
import { Workflows } from "./workflows.jsx";

const PANELS = {
  overview: ["Overview", Overview],
  models: ["Models", Models],
  requests: ["Requests", Requests],
  workflows: ["Workflows", Workflows],
  try: ["Try it", TryIt],
  tune: ["Tune", Tune],
  gpus: ["GPUs", Gpus],
  settings: ["Settings", Settings],
};

function useRoute() {
  const read = () => location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const [route, set] = useState(read());
  useLayoutEffect(() => {
    const follow = () => set(read());
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  return route;
}

function Console() {
  useStore();
  const [panel, name, version] = useRoute();
  const now = latest();
  if (state.phase === "login") return <Login />;
  const shown = PANELS[panel] ? panel : "overview";
  const [title, Panel] = PANELS[shown];
  document.title = `${title} · wsgi-ts`;
  return (
    <div class="frame">
      <a class="skip" href="#main" onClick={skip}>
        Skip to the content
      </a>
      <aside class="side">
        <div class="brand">
          <span class="mark">
            <Icon name="overview" />
          </span>
          <span>
            wsgi-ts<small>console</small>
          </span>
          <span class="end">
            <Phase />
            <ThemeButton />
          </span>
        </div>
        <Nav shown={shown} now={now} />
        <div class="side-end">
          <a href="/docs">
            <Icon name="docs" size={14} /> API documentation
          </a>
          {now && <span>version {now.server.version}</span>}
        </div>
      </aside>
      <main class="main" id="main" tabIndex={-1}>
        {now && state.message && (
          <div class="notices">
            <div class="notice bad">
              <span class="dot bad" /> {state.message} <span class="what">What is shown is of {clock(now.at)}.</span>
            </div>
          </div>
        )}
        {now ? <Panel name={name} version={version} key={`${shown}/${name ?? ""}/${version ?? ""}`} /> : <p class="empty">{state.message || "Connecting…"}</p>}
        {state.phase === "refused" && (
          <p class="empty">
            <button type="button" onClick={signIn}>
              Use another key
            </button>
          </p>
        )}
      </main>
      <Toasts />
    </div>
  );
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

function Nav({ shown, now }) {
  const tags = { models: now?.models.length, workflows: now?.workflows.length };
  const names = Object.keys(PANELS).filter((name) => name !== "gpus" || now?.gpus.length);
  return (
    <nav class="nav" aria-label="Panels">
      {names.map((name) => (
        <a href={`#/${name}`} key={name} aria-current={name === shown ? "page" : undefined}>
          <Icon name={name} />
          {PANELS[name][0]}
          {tags[name] > 0 && <span class="tag">{tags[name]}</span>}
        </a>
      ))}
    </nav>
  );
}

const PHASES = { live: ["good", "Live"], lost: ["bad", "Lost"], refused: ["bad", "Refused"], connecting: ["warn", "…"], paused: ["", "Paused"] };

function Phase() {
  const [level, text] = PHASES[state.phase] ?? PHASES.connecting;
  return (
    <span class="live" role="status" title={state.message}>
      <span class={`dot ${level}`} />
      {text}
    </span>
  );
}

function Login() {
  const [key, set] = useState("");
  const submit = (event) => {
    event.preventDefault();
    setKey(key.trim());
  };
  return (
    <main class="login">
      <form class="card" onSubmit={submit}>
        <div class="brand">
          <span class="mark">
            <Icon name="overview" />
          </span>
          <span>
            wsgi-ts<small>console</small>
          </span>
        </div>
        <h1>Sign in</h1>
        <p class="soft">
          This server asks for a key. The management key is in <code>key_file.json</code>, where the server was started.
        </p>
        {state.key && <p class="notice bad">{state.message || "That key does not count, or no longer."}</p>}
        <label class="field">
          Management key
          <input type="password" autocomplete="current-password" value={key} onInput={(event) => set(event.target.value)} required autofocus />
        </label>
        <button type="submit" class="main-action">
          Sign in
        </button>
      </form>
    </main>
  );
}

applyTheme();
render(<Console />, document.getElementById("app"));
start();
