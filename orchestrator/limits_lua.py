"""The Lua of the rate limits; limits.py packs its arguments and reads its replies.

A caller's hash at one endpoint has a field for each used window and one, "c", for its clock. A window is packed as
`head` (the number of the newest sub-bucket), `sum`, and the counts of at most 61 sub-buckets, oldest first, the last
one being `head`'s, each number 6 bytes little-endian. A sub-bucket is 1/60 of the window: the one being filled and the
60 before it hold every request of any interval of the window's length, and none that is older than 61/60 of it.

The clock is Redis's, held so that it never goes backwards for a key: `last` is the latest time of an accepted request.
A clock that goes back by up to a minute stands still until it has caught up; one that goes back further had been
wrong before, and the key's time goes on from `last` at its pace (`offset`): nothing is forgotten, and nobody waits for
the wrong time to come round. `born` tells a hash from one that was reset meanwhile.

Lua's numbers are doubles, exact to 2^53. A count stops at 4e12, so that no sum of 61 of them outgrows its 6 bytes.
"""

from __future__ import annotations

LIMITS_LUA = r"""
local limits_zero, limits_most = "\0\0\0\0\0\0", 4e12
local limits_pack, limits_unpack = struct.pack, struct.unpack
local limits_find, limits_part, limits_floor = string.find, string.sub, math.floor

-- The sum and the counts of a stored window, brought forward to this bucket.
local function limits_forward(kept, bucket)
  if not kept then return 0, limits_zero end
  local head, sum = limits_unpack("<I6I6", kept)
  local gap = bucket - head
  if gap == 0 then return sum, limits_part(kept, 13) end
  if gap > 60 or sum == 0 then return 0, limits_zero end
  local body = limits_part(kept, 13) .. string.rep(limits_zero, gap)
  local excess = #body - 366
  if excess > 0 then
    local at = limits_find(body, "[^%z]")
    while at and at <= excess do
      at = at - (at - 1) % 6
      sum = sum - limits_unpack("<I6", body, at)
      at = limits_find(body, "[^%z]", at + 6)
    end
    body = limits_part(body, excess + 1)
  end
  return sum, body
end

-- Milliseconds from `seen` until the first count leaves the window that is not 0; with `excess`, until so much has.
local function limits_free(body, bucket, step, seen, excess)
  local at, freed = limits_find(body, "[^%z]"), 0
  while at do
    at = at - (at - 1) % 6
    local free = (bucket - (#body - at - 5) / 6 + 61) * step - seen
    if not excess then return free end
    freed = freed + limits_unpack("<I6", body, at)
    if freed >= excess then return free end
    at = limits_find(body, "[^%z]", at + 6)
  end
  return 0
end

-- Live leases of one caller, after the expired ones were removed.
local function limits_running(lease_key, now, limit)
  redis.call("ZREMRANGEBYSCORE", lease_key, "-inf", now)
  local running = redis.call("ZCARD", lease_key)
  if running >= limit then  -- a lease from a clock that was ahead would not expire; its holder, if it lives, renews it
    running = running - redis.call("ZREMRANGEBYSCORE", lease_key, now + 90001, "+inf")
  end
  return running
end

local function limits_reserve(hash_key, lease_key, packed)
  local now, mode, tokens, minute, hour, day, tokens_minute, tokens_day, concurrency, rest =
    limits_unpack("<i8BI8I8I8I8I8I8I8", packed)
  if now < 0 then
    local clock = redis.call("TIME")
    now = clock[1] * 1000 + limits_floor(clock[2] / 1000)
  end
  local caps = {minute, hour, day, tokens_minute, tokens_day}
  local fields, steps = {"m", "h", "d", "tm", "td"}, {1000, 60000, 1440000, 1000, 1440000}
  local refused, wait, longest = 0, 0, 0
  local time, seen, last, offset, born, moved = now, now, now, 0, now, false
  local buckets, sums, bodies = {}, {}, {}

  if minute + hour + day + tokens_minute + tokens_day > 0 then
    local kept = redis.call("HMGET", hash_key, "c", "m", "h", "d", "tm", "td")
    if kept[1] then
      last, offset, born = limits_unpack("<I6I6I6", kept[1])
      moved = now + offset < last - 60000
      if moved then offset = last - now end
      seen = now + offset
      time = math.max(seen, last)
    end
    for i = 1, 5 do
      local limit, step = caps[i], steps[i]
      if limit > 0 then
        local bucket, cost = limits_floor(time / step), 0
        local sum, body = limits_forward(kept[i + 1], bucket)
        if mode < 2 then cost = i < 4 and 1 or tokens end
        if sum + cost > limit then
          local free = cost <= limit and limits_free(body, bucket, step, seen, sum + cost - limit)
            or math.max(60 * step, limits_free(body, bucket, step, seen))
          if free > wait then refused, wait = i, free end
        end
        buckets[i], sums[i], bodies[i] = bucket, sum, body
        if step > longest then longest = step end
      end
    end
  end

  local running = 0
  if concurrency > 0 then
    running = limits_running(lease_key, now, concurrency)
    if running >= concurrency and mode < 2 and wait < 1000 then refused, wait = 6, 1000 end
  end

  local accepted = refused == 0 or mode == 0
  if accepted and mode < 2 then
    if longest > 0 then
      local set, n = {"HSET", hash_key, "c", limits_pack("<I6I6I6", time, offset, born)}, 4
      for i = 1, 5 do
        local body = bodies[i]
        if body then
          local count = limits_unpack("<I6", body, #body - 5)
          local more = count + (i < 4 and 1 or tokens)
          if more > limits_most then more = limits_most end
          sums[i] = sums[i] + more - count
          body = limits_part(body, 1, -7) .. limits_pack("<I6", more)
          bodies[i] = body
          set[n + 1], set[n + 2] = fields[i], limits_pack("<I6I6", buckets[i], sums[i]) .. body
          n = n + 2
        end
      end
      redis.call(unpack(set))
      redis.call("PEXPIRE", hash_key, longest * 62)
    end
    if concurrency > 0 then
      redis.call("ZADD", lease_key, now + 30000, limits_part(packed, rest))
      redis.call("PEXPIRE", lease_key, 60000)
      running = running + 1
    end
  elseif moved and mode < 2 then
    redis.call("HSET", hash_key, "c", limits_pack("<I6I6I6", last, offset, born))
  end

  local reply, n = {accepted and 1 or 0, refused, wait, born, time, tokens}, 6
  for i = 1, 5 do
    if bodies[i] then
      reply[n + 1], reply[n + 2] = sums[i], limits_free(bodies[i], buckets[i], steps[i], seen)
      n = n + 2
    end
  end
  if concurrency > 0 then reply[n + 1], reply[n + 2] = running, running > 0 and 1000 or 0 end
  return reply
end
"""

SETTLE_LUA = r"""
local born, time, reserved, actual, used, rest = struct.unpack("<I8I8I8I8B", ARGV[1])
local zero = "\0\0\0\0\0\0"

-- The window with the actual count in place of the reserved one, or nothing where that has left it.
local function settled(kept, bucket)
  local head, sum = struct.unpack("<I6I6", kept)
  local body = string.sub(kept, 13)
  local at = #body - 5 - 6 * (head - bucket)
  if at > #body or at <= #body - 366 then return nil end
  if at < 1 then  -- nothing was reserved, and empty buckets at the front are not kept
    body, at = string.rep(zero, (1 - at) / 6) .. body, 1
  end
  local count = struct.unpack("<I6", body, at)
  local now = math.min(math.max(count - reserved + actual, 0), 4e12)
  return struct.pack("<I6I6", head, sum + now - count)
    .. string.sub(body, 1, at - 1) .. struct.pack("<I6", now) .. string.sub(body, at + 6)
end

if used % 4 > 0 and reserved ~= actual then
  local kept = redis.call("HMGET", KEYS[1], "c", "tm", "td")
  if kept[1] and select(3, struct.unpack("<I6I6I6", kept[1])) == born then
    local minute = used % 2 == 1 and kept[2] and settled(kept[2], math.floor(time / 1000))
    local day = used % 4 > 1 and kept[3] and settled(kept[3], math.floor(time / 1440000))
    if minute then redis.call("HSET", KEYS[1], "tm", minute) end
    if day then redis.call("HSET", KEYS[1], "td", day) end
  end
end
if used > 3 then redis.call("ZREM", KEYS[2], string.sub(ARGV[1], rest)) end
return 1
"""

RENEW_LUA = r"""
local clock = redis.call("TIME")
local expires = clock[1] * 1000 + math.floor(clock[2] / 1000) + 30000
for i = 1, #ARGV do redis.call("ZADD", KEYS[1], expires, ARGV[i]) end
redis.call("PEXPIRE", KEYS[1], 60000)
return 1
"""
