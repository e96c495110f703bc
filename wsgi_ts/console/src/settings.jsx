// All settings: value, default, and where the value comes from; and what the doctor says of this machine.
import { useState } from "preact/hooks";
import { Card, Tabs, Title, useFetched } from "./parts.jsx";
import { json } from "./store.js";

const LEVELS = { OK: "good", WARN: "warn", FAIL: "bad" };

export function Settings() {
  const { data, error } = useFetched(() => json("/console/settings"), 0);
  const [filter, setFilter] = useState("");
  const [which, setWhich] = useState("set");
  if (error) return <p class="notice bad">{error.message}</p>;
  const rows = (data?.settings ?? []).filter(
    (row) => (which === "all" || row.source || row.value !== row.default) && `${row.key} ${row.value} ${row.help}`.toLowerCase().includes(filter.toLowerCase()),
  );
  return (
    <>
      <Title note="config.properties, environment and command line, as the server has read them">Settings</Title>
      <div class="grid">
        <Card title="Settings" flush className="w8"
          end={
            <>
              <input type="search" placeholder="Search" aria-label="Search settings" value={filter} onInput={(event) => setFilter(event.target.value)} />
              <Tabs label="Which settings" value={which} onChange={setWhich} options={[["set", "Changed"], ["all", "All"]]} />
            </>
          }
        >
          <table>
            <thead>
              <tr>
                <th scope="col">Key</th>
                <th scope="col">Value</th>
                <th scope="col" class="wide-only">Default</th>
                <th scope="col">Source</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((row) => (
                <tr key={row.key}>
                  <td>
                    <span class="mono">{row.key}</span>
                    <span class="sub">
                      {row.help}
                      {row.has_effect ? "" : " (no effect here)"}
                    </span>
                  </td>
                  <td class={`mono value ${row.value !== row.default ? "strong" : "faint"}`}>{row.value || "–"}</td>
                  <td class="mono faint wide-only">{row.default || "–"}</td>
                  <td class="soft" title={row.source}>{row.source.split("/").at(-1) || (row.value === row.default ? "default" : "the launcher")}</td>
                </tr>
              ))}
            </tbody>
          </table>
          {data && !rows.length && <p class="empty">{filter ? "No key fits." : "Everything is as by default."}</p>}
        </Card>
        <Card title="Doctor" flush className="w4" note="what wsgi-ts doctor says">
          <table>
            <tbody>
              {(data?.findings ?? []).map((finding) => (
                <tr key={finding.subject + finding.text}>
                  <td>
                    <span class={`tag ${LEVELS[finding.level]}`}>{finding.level}</span>
                  </td>
                  <td>
                    {finding.subject}
                    <span class="sub">{finding.text}</span>
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </Card>
      </div>
    </>
  );
}
