// The API description as forms: fill in, send, and see the same call for curl.
import { useEffect, useMemo, useState } from "preact/hooks";
import { bytes, ms, shellQuoted } from "./format.js";
import { Card, Copy } from "./parts.jsx";

const METHODS = ["get", "post", "put", "delete", "patch", "options"];

/** The operations of a description, without those that only repeat another one with another method. */
function operationsOf(source) {
  const found = [];
  for (const [path, methods] of Object.entries(source.document.paths)) {
    for (const method of METHODS) {
      const operation = methods[method];
      if (!operation || operation.operationId?.endsWith(`_${method}`) || methods.servers) continue;
      found.push({ ...operation, path, method, source, id: `${source.name} ${method} ${path}` });
    }
  }
  return found;
}

/** `sources`: [{name, document, prefix, address, headers}]; `call` sends. */
export function Api({ sources, call, models }) {
  const operations = useMemo(() => sources.flatMap(operationsOf), [sources]);
  const [filter, setFilter] = useState("");
  const [id, setId] = useState(null);
  const preferred = operations.find((each) => each.path === "/predictions/{model_name}") ?? operations.find((each) => each.method !== "options" && each.path !== "/api-description");
  const chosen = operations.find((each) => each.id === id) ?? preferred;
  const shown = operations.filter((each) => `${each.method} ${each.path} ${each.description}`.toLowerCase().includes(filter.toLowerCase()));
  return (
    <div class="api">
      <section class="card list" aria-label="Operations">
        <input type="search" placeholder="Search operations" aria-label="Search operations" value={filter} onInput={(event) => setFilter(event.target.value)} style={{ width: "100%" }} />
        {sources.map((source) => (
          <div key={source.name}>
            <h3>{source.name}</h3>
            {shown
              .filter((each) => each.source === source)
              .map((each) => (
                <button type="button" key={each.id} aria-pressed={each === chosen} onClick={() => setId(each.id)}>
                  <span class={`verb ${each.method}`}>{each.method.toUpperCase()}</span>
                  <span class="path">{each.path}</span>
                </button>
              ))}
          </div>
        ))}
      </section>
      {chosen && <Operation operation={chosen} call={call} models={models} key={chosen.id} />}
    </div>
  );
}

function Operation({ operation, call, models }) {
  const types = Object.keys(operation.requestBody?.content ?? {}).filter((type) => !type.startsWith("multipart"));
  const [values, setValues] = useState(() => (models?.length && operation.path.includes("{model_name}") ? { model_name: models[0] } : {}));
  const [type, setType] = useState(types.includes("application/json") ? "application/json" : types[0]);
  const [text, setText] = useState(() => sample(operation.requestBody?.content?.["application/json"]?.schema));
  const [file, setFile] = useState(null);
  const [answer, setAnswer] = useState(null);
  const missing = operation.parameters.filter((each) => each.required && !values[each.name]);
  const target = targetOf(operation, values);
  const hasBody = types.length > 0;
  const body = hasBody ? (file ?? text) : null;
  const send = async (event) => {
    event.preventDefault();
    setAnswer({ waits: true });
    const began = performance.now();
    const headers = { ...operation.source.headers, ...(hasBody ? { "content-type": type } : {}) };
    try {
      const said = await call(operation.method.toUpperCase(), operation.source.prefix + target, { headers, body: body || undefined });
      setAnswer(await shownAnswer(said, performance.now() - began));
    } catch (error) {
      setAnswer({ error: String(error) });
    }
  };
  return (
    <div class="stack">
      <Card>
        <form class="stack" onSubmit={send}>
          <div class="row">
            <span class={`verb ${operation.method}`}>{operation.method.toUpperCase()}</span>
            <h2 class="path">{operation.path}</h2>
          </div>
          <p class="soft">{operation.description}</p>
          {operation.parameters.length > 0 && (
            <div class="fields">
              {operation.parameters.map((parameter) => (
                <Field parameter={parameter} key={parameter.name} models={models} value={values[parameter.name] ?? ""} onChange={(value) => setValues({ ...values, [parameter.name]: value })} />
              ))}
            </div>
          )}
          {hasBody && (
            <div class="stack">
              <div class="row">
                <label class="field">
                  Content type
                  <select value={type} onChange={(event) => setType(event.target.value)}>
                    {types.map((each) => (
                      <option key={each}>{each}</option>
                    ))}
                  </select>
                </label>
                <label class="field">
                  or a file
                  <input type="file" onChange={(event) => setFile(event.target.files[0] ?? null)} />
                </label>
              </div>
              <Schema content={operation.requestBody.content} document={operation.source.document} />
              {!file && <textarea aria-label="Body" value={text} spellcheck={false} onInput={(event) => setText(event.target.value)} />}
            </div>
          )}
          <div class="row">
            <button type="submit" class="main-action" disabled={missing.length > 0 || answer?.waits}>
              {answer?.waits ? "Waiting…" : "Send"}
            </button>
            {missing.length > 0 && <span class="note">Needed: {missing.map((each) => each.name).join(", ")}</span>}
          </div>
        </form>
      </Card>
      <Card title="The same with curl" end={<Copy text={curl(operation, target, type, body, file)} label="Copy the curl command" />}>
        <pre tabIndex={0}>{curl(operation, target, type, body, file)}</pre>
      </Card>
      {answer && !answer.waits && <AnswerCard answer={answer} />}
      <Card title="Answers" flush>
        <table>
          <tbody>
            {Object.entries(operation.responses).map(([status, response]) => (
              <tr key={status}>
                <td>
                  <span class={`tag ${status < "3" ? "good" : status < "5" ? "warn" : "bad"}`}>{status}</span>
                </td>
                <td>
                  {response.description}
                  <Schema content={response.content} document={operation.source.document} />
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </Card>
    </div>
  );
}

function Schema({ content, document }) {
  const schema = content?.["application/json"]?.schema;
  const text = schema && typeText(schema, document);
  if (!text || !text.includes("{")) return null;
  return (
    <details>
      <summary class="note">JSON</summary>
      <pre class="schema">{text}</pre>
    </details>
  );
}

/** A schema in the notation of types that most languages have in common. */
function typeText(schema, document, indent = "", depth = 0) {
  if (schema.$ref) return typeText(document.components.schemas[schema.$ref.split("/").at(-1)] ?? {}, document, indent, depth);
  const choices = schema.oneOf ?? schema.anyOf;
  if (choices) return choices.map((each) => typeText(each, document, indent, depth)).join(" | ");
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  if (schema.type === "array") return `[${typeText(schema.items ?? {}, document, indent, depth)}]`;
  if (!schema.properties) return schema.type ?? "any";
  if (depth > 5) return "{…}";
  const inner = `${indent}  `;
  const rows = Object.entries(schema.properties).map(([name, row]) => {
    const mark = schema.required?.includes(name) ? "" : "?";
    const note = row.description ? `  // ${row.description}` : "";
    return `${inner}${name}${mark}: ${typeText(row, document, inner, depth + 1)}${note}`;
  });
  return `{\n${rows.join("\n")}\n${indent}}`;
}

function Field({ parameter, value, onChange, models }) {
  const schema = parameter.schema ?? {};
  const options = schema.enum ?? (schema.type === "boolean" ? ["true", "false"] : null);
  const usual = schema.default == null ? "" : String(schema.default);
  const listId = parameter.name === "model_name" && models?.length ? "model-names" : undefined;
  return (
    <label class="field" title={parameter.description}>
      <span>
        {parameter.name}
        {parameter.required ? " *" : ""}
      </span>
      {options ? (
        <select value={value} onChange={(event) => onChange(event.target.value)}>
          <option value="">{usual || "–"}</option>
          {options.map((each) => (
            <option key={each}>{each}</option>
          ))}
        </select>
      ) : (
        <input value={value} placeholder={usual} list={listId} onInput={(event) => onChange(event.target.value)} />
      )}
      {listId && (
        <datalist id={listId}>
          {models.map((each) => (
            <option value={each} key={each} />
          ))}
        </datalist>
      )}
    </label>
  );
}

function targetOf(operation, values) {
  const path = operation.path.replace(/\{(\w+)\}/g, (whole, name) => (values[name] ? encodeURIComponent(values[name]) : whole));
  const query = operation.parameters.filter((each) => each.in === "query" && values[each.name]).map((each) => `${encodeURIComponent(each.name)}=${encodeURIComponent(values[each.name])}`);
  return query.length ? `${path}?${query.join("&")}` : path;
}

function curl(operation, target, type, body, file) {
  const parts = [`curl -X ${operation.method.toUpperCase()} ${shellQuoted(operation.source.address + target)}`];
  if (operation.security?.length) parts.push(`-H "Authorization: Bearer $KEY"`);
  if (body) {
    parts.push(`-H ${shellQuoted(`Content-Type: ${type}`)}`);
    parts.push(file ? `--data-binary @${shellQuoted(file.name)}` : `-d ${shellQuoted(body)}`);
  }
  return parts.join(" \\\n  ");
}

/** A body that fits a schema, as far as that says anything. */
function sample(schema) {
  const properties = schema?.properties;
  if (!properties) return schema ? '{"data": [1, 2, 3]}' : "";
  const shown = Object.entries(properties).filter(([name]) => schema.required?.includes(name));
  return JSON.stringify(Object.fromEntries(shown.map(([name, row]) => [name, row.default ?? ""])), null, 2);
}

async function shownAnswer(answer, took) {
  const data = new Uint8Array(await answer.arrayBuffer());
  const headers = [...answer.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
  const base = { status: answer.status, phrase: answer.statusText, took, size: data.length, headers };
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(data.subarray(0, 1 << 20));
    try {
      return { ...base, text: JSON.stringify(JSON.parse(text), null, 2) };
    } catch {
      return { ...base, text };
    }
  } catch {
    return { ...base, data };
  }
}

function AnswerCard({ answer }) {
  const [url, setUrl] = useState(null);
  useEffect(() => {
    if (!answer.data) return undefined;
    const made = URL.createObjectURL(new Blob([answer.data]));
    setUrl(made);
    return () => URL.revokeObjectURL(made);
  }, [answer]);
  if (answer.error) return <p class="notice bad">{answer.error}</p>;
  return (
    <Card title="Answer" note={`${ms(answer.took)} · ${bytes(answer.size)}`} end={<span class={`tag ${answer.status < 300 ? "good" : "bad"}`}>{answer.status} {answer.phrase}</span>}>
      <div class="stack" role="status">
        {answer.text != null ? <pre tabIndex={0}>{answer.text || "(empty)"}</pre> : <a href={url} download="answer">Save {bytes(answer.size)} of data</a>}
        <details>
          <summary class="note">Headers</summary>
          <pre>{answer.headers}</pre>
        </details>
      </div>
    </Card>
  );
}
