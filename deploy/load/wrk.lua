-- Load at full speed from few threads; see README.md. PAYLOAD names the file that is the body of each request.
local payload = os.getenv("PAYLOAD")
wrk.method = "POST"
wrk.body = "[1.0, 2.0, 3.0]"
wrk.headers["Content-Type"] = os.getenv("CONTENT_TYPE") or "application/json"
if payload then
  local file = assert(io.open(payload, "rb"))
  wrk.body = file:read("*a")
  file:close()
end

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

-- In each thread: how many answers of each status.
function init(args)
  statuses = {}
end

function response(status, headers, body)
  statuses[status] = (statuses[status] or 0) + 1
end

function done(summary, latency, requests)
  local counts = {}
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("statuses")) do
      counts[status] = (counts[status] or 0) + count
    end
  end
  io.write(string.format("%.0f requests/s, p50 %.2f ms, p99 %.2f ms\n", summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000))
  for status, count in pairs(counts) do
    io.write(string.format("status %d: %d\n", status, count))
  end
  local errors = summary.errors
  io.write(string.format("without an answer: %d\n", errors.connect + errors.read + errors.write + errors.timeout))
end
