-- The load of one run (see load.py): POST requests with the headers HEADERS and a body of BODY_BYTES bytes, or BODY_HEX.
-- With DISTINCT_HEADS every request has a trace id, a request id and a length of its own. The figures are one line of JSON.
local body = string.rep("x", tonumber(os.getenv("BODY_BYTES")))
if os.getenv("BODY_HEX") ~= "" then
  body = os.getenv("BODY_HEX"):gsub("%x%x", function(pair) return string.char(tonumber(pair, 16)) end)
end
wrk.method = "POST"
wrk.body = body
for name, value in os.getenv("HEADERS"):gmatch("([^:\n]+): ([^\n]*)\n") do
  wrk.headers[name] = value
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
