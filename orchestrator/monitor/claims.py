"""Which replica tells of an alert that is the whole deployment's: they agree through Redis.

The first that sees it fire tells so; the last that sees it no longer tells that it is resolved. A replica's word counts
until it takes it back, or has not renewed it for longer than an alert is repeated. Without Redis each tells for itself.
"""

from __future__ import annotations

from orchestrator.store import Script, Store, StoreAway, StoreError, told_key

SPARE_S = 3600.0  # beyond the pause between two repetitions

# KEYS: the alert. ARGV: firing or resolved, the replica, Unix time, seconds that its word counts, how often repeated.
# Hash: "told", "by" and "at" are the last message, whose it was and when; "on:<replica>" until when its word counts.
_TEXT = """
local key, state, who, now, ttl, repeats = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local others = 0
for _, field in ipairs(redis.call('HKEYS', key)) do
  if string.sub(field, 1, 3) == 'on:' and field ~= 'on:' .. who then
    if tonumber(redis.call('HGET', key, field)) > now then others = others + 1 else redis.call('HDEL', key, field) end
  end
end
if state == 'firing' then redis.call('HSET', key, 'on:' .. who, now + ttl)
else redis.call('HDEL', key, 'on:' .. who) end
redis.call('EXPIRE', key, ttl)
if state == 'resolved' and others > 0 then return 0 end
local told = redis.call('HMGET', key, 'told', 'by', 'at')
local again = told[1] == state
if again and state == 'firing' and repeats ~= '0' then
  again = now - tonumber(told[3]) < (ttl - SPARE) / 2
end
if again and told[2] ~= who then return 0 end
redis.call('HSET', key, 'told', state, 'by', who, 'at', now)
return 1
"""
_CLAIM = Script(_TEXT.replace("SPARE", str(int(SPARE_S))))


async def claim(store: Store, id: str, state: str, who: str, now: float, repeat_s: float, repeats: int) -> bool:
    """Whether `who` is to tell that this alert is firing or resolved; True where Redis cannot be asked.

    Asking again gets the same answer, so that a replica that ended in between still tells.
    """
    arguments = (state, who, f"{now:.3f}", int(repeat_s + SPARE_S), repeats)
    try:
        return bool(await store.run_script(_CLAIM, (told_key(id),), arguments))
    except (StoreAway, StoreError):
        return True
