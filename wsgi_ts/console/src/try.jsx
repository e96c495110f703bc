// Try it: both APIs of this server, from its own descriptions.
import { useMemo, useState } from "preact/hooks";
import { Api } from "./api.jsx";
import { Title, useFetched } from "./parts.jsx";
import { call, json, latest, setKey, state } from "./store.js";

const PROXY = "/console/inference";

/** An address as this browser would write it: the server may listen on all of its addresses. */
function shown(address) {
  const url = new URL(address.startsWith("unix:") ? "http://localhost" : address);
  if (["0.0.0.0", "[::]"].includes(url.hostname)) url.hostname = location.hostname;
  return url.origin;
}

export function TryIt() {
  const { server, models } = latest();
  const [key, setOwn] = useState(state.inferenceKey);
  const { data, error } = useFetched(async () => {
    const [management, inference] = await Promise.all([json("/api-description"), server.combined ? null : json(`${PROXY}/api-description`)]);
    return { management, inference };
  }, 0);
  const headers = state.inferenceKey ? { "x-inference-authorization": `Bearer ${state.inferenceKey}` } : {};
  const sources = useMemo(() => {
    if (!data) return [];
    const address = server.addresses.inference ?? location.origin;
    const own = { name: data.inference ? "Management" : "API", document: data.management, prefix: "", address: location.origin };
    const other = data.inference && { name: "Inference", document: data.inference, prefix: PROXY, address: shown(address), headers };
    return other ? [other, own] : [own];
  }, [data, state.inferenceKey]);
  const names = [...new Set(models.filter((model) => !model.workflow).map((model) => model.name))];
  return (
    <>
      <Title note="From the server's own API description" end={
        server.tokens && !server.combined && (
          <form class="row" onSubmit={(event) => { event.preventDefault(); setKey(state.key, key); }}>
            <input type="password" autocomplete="off" aria-label="Inference key" placeholder="Inference key" value={key} onInput={(event) => setOwn(event.target.value)} />
            <button type="submit">Use</button>
          </form>
        )
      }>
        Try it
      </Title>
      {error && <p class="notice bad">{error.message}</p>}
      {sources.length > 0 && <Api sources={sources} call={call} models={names} />}
    </>
  );
}
