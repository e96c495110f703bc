// /docs: the API description of this address as a page.
import { render } from "preact";
import { useMemo, useState } from "preact/hooks";
import { Api } from "./api.jsx";
import { Icon, useFetched } from "./parts.jsx";
import { call, json, setKey, state } from "./store.js";
import { applyTheme, ThemeButton } from "./theme.jsx";

function Docs() {
  const { data, error } = useFetched(() => json("/api-description"), 0);
  const [key, set] = useState(state.key);
  const sources = useMemo(() => (data ? [{ name: "Operations", document: data, prefix: "", address: location.origin }] : []), [data]);
  const asks = Object.keys(data?.components.securitySchemes ?? {}).length > 0;
  return (
    <main class="main">
      <header class="head">
        <span class="mark">
          <Icon name="docs" />
        </span>
        <div>
          <h1>{data?.info.title ?? "API"}</h1>
          <p class="soft">
            {data?.info.description} · version {data?.info.version} · <a href="/api-description">OpenAPI {data?.openapi}</a>
          </p>
        </div>
        <div class="end">
          {asks && (
            <form class="row" onSubmit={(event) => { event.preventDefault(); setKey(key.trim()); }}>
              <input type="password" autocomplete="off" aria-label="Key" placeholder="Key" value={key} onInput={(event) => set(event.target.value)} />
              <button type="submit">Use</button>
            </form>
          )}
          <ThemeButton />
        </div>
      </header>
      {error && <p class="notice bad">{error.message}</p>}
      {sources.length > 0 && <Api sources={sources} call={call} />}
    </main>
  );
}

applyTheme();
render(<Docs />, document.getElementById("app"));
