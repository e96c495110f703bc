-- The load of one run (see load.py): POST requests with the headers HEADERS and a body of BODY_BYTES bytes, or BODY_HEX.
-- HEADS=equal adds the header lines that a client behind a proxy sends, HEADS=distinct makes those of every request differ:
-- trace id, request id, and the body's length. The figures are one line of JSON.
local DISTINCT = 4096
local requests = {}
local position = 0

local body = string.rep("x", tonumber(os.getenv("BODY_BYTES")))
if os.getenv("BODY_HEX") ~= "" then
  body = os.getenv("BODY_HEX"):gsub("%x%x", function(pair) return string.char(tonumber(pair, 16)) end)
end
wrk.method = "POST"
wrk.body = body
for name, value in os.getenv("HEADERS"):gmatch("([^:\n]+): ([^\n]*)\n") do
  wrk.headers[name] = value
end

local function random()
  return math.random(0, 2147483647)
end

-- With Host, Content-Type and Content-Length: twelve lines.
local function set_proxy_headers(headers)
  headers["User-Agent"] = "python-httpx/0.28.1"
  headers["Accept"] = "*/*"
  headers["Accept-Encoding"] = "gzip, deflate, br"
  headers["X-Forwarded-For"] = "10.12.0.7"
  headers["X-Forwarded-Proto"] = "https"
  headers["X-Forwarded-Host"] = "models.example.org"
  headers["tracestate"] = "congo=t61rcWkgMzE"
  headers["traceparent"] = string.format("00-%08x%08x%08x%08x-%08x%08x-01",
    random(), random(), random(), random(), random(), random())
  headers["x-request-id"] = string.format("%08x-%04x-%04x-%04x-%08x%04x", random(), random() % 65536, random() % 65536,
    random() % 65536, random(), random() % 65536)
end

local heads = os.getenv("HEADS")
if heads ~= "" then
  set_proxy_headers(wrk.headers)
end

-- Requests are made once, and sent in turn; they come back only after 4095 others: more than a server remembers.
function init(arguments)
  if heads ~= "distinct" then
    return
  end
  math.randomseed(os.time())
  for number = 1, DISTINCT do
    set_proxy_headers(wrk.headers)
    local length = math.max(0, #body - 40 + number % 81)
    requests[number] = wrk.format(nil, nil, nil, string.rep("x", length))
  end
end

if heads == "distinct" then
  function request()
    position = position % DISTINCT + 1
    return requests[position]
  end
end

function done(summary, latency, requests)
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "max_ms": %f, ' ..
    '"refused": %d, "broken": %d, "timed_out": %d}\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
    summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write, summary.errors.timeout))
end
