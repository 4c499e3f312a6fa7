-- Makes wrk speak to a forward proxy: wrk -s absolute.lua http://PROXY -- http://ORIGIN/PATH [LEAST MOST]
--
-- The request line carries the whole URL. There is no request() function on purpose: without one wrk formats the request once
-- and sends the same bytes each time, so that the load costs as little as it can on the core that it shares with the origin.

-- A second and third argument are the least and most milliseconds that each client waits before its next request.
function init(args)
   if args[3] then
      local least, most = tonumber(args[2]), tonumber(args[3])
      delay = function() return math.random(least, most) end
   end
   wrk.path = args[1]
   wrk.headers["Host"] = args[1]:match("^http://([^/]+)")
   wrk.headers["User-Agent"] = "wrk"
   wrk.headers["Accept"] = "*/*"
end

-- wrk's own report has no 95th percentile and rounds the others. bench/run reads this line; times are in microseconds.
function done(summary, latency)
   local e = summary.errors
   io.write(string.format("figures requests=%d us=%d p50=%d p95=%d p99=%d errors=%d\n",
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(95), latency:percentile(99),
      e.connect + e.read + e.write + e.timeout + e.status))
end
