"""Which replica tells of an alert that is the whole deployment's: they agree through Redis.

The first that sees it fire tells so; the last that sees it no longer tells that it is resolved. A replica's word that
it fires counts until it takes it back, or has not renewed it for a minute: one that is gone holds up nobody. Without
Redis each tells for itself.
"""

from __future__ import annotations

from orchestrator.store import Script, Store, StoreAway, StoreError, told_key

KEPT_S = 3600.0  # that what was told is known, beyond the pause between two repetitions
ELSEWHERE, MINE, LATER = 0, 1, 2  # another one tells; who asked does; another one still sees it fire: ask again

# Hash: "told", "by" and "at" are the last message, whose it was and when; "on:<replica>" until when its word counts, by
# Redis's own clock. "by" is empty once the one that told that it fires sees it fire no longer.
_WORD = """
local clock = redis.call('TIME')
local moment = clock[1] + clock[2] / 1000000
local key, who, life, kept = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3]
"""

# ARGV: the replica, seconds that its word counts, that the key is kept.
_RENEW = Script(_WORD + "redis.call('HSET', key, 'on:' .. who, moment + life)\nredis.call('EXPIRE', key, kept)\n")

# ARGV: the same, then firing or resolved, Unix time, seconds between two repetitions, how often repeated.
_CLAIM = Script(
    _WORD
    + """
local state, now, pause, repeats = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local others = false
for _, field in ipairs(redis.call('HKEYS', key)) do
  if string.sub(field, 1, 3) == 'on:' and field ~= 'on:' .. who then
    if tonumber(redis.call('HGET', key, field)) > moment then others = true else redis.call('HDEL', key, field) end
  end
end
if state == 'firing' then redis.call('HSET', key, 'on:' .. who, moment + life)
else redis.call('HDEL', key, 'on:' .. who) end
redis.call('EXPIRE', key, kept)
local told = redis.call('HMGET', key, 'told', 'by', 'at')
if state == 'resolved' and others then
  if told[2] == who then redis.call('HSET', key, 'by', '') end
  return 2
end
local again = told[1] == state
if state == 'firing' then
  -- told by one that is gone, while nobody else sees it fire: that one is over, and this one is new
  if repeats == '0' then again = again and others
  else again = again and now - tonumber(told[3]) < pause / 2 end
end
if again and told[2] ~= who then return 0 end
redis.call('HSET', key, 'told', state, 'by', who, 'at', now)
return 1
"""
)


async def claim(
    store: Store, id: str, state: str, who: str, now: float, repeat_s: float, repeats: int, life_s: float
) -> int:
    """Whether `who` is to tell that this alert is firing or resolved: MINE, ELSEWHERE or LATER.

    MINE where Redis cannot be asked. Asking again gets the same answer, so that a replica that ended in between still
    tells. That it fires counts for `life_s` seconds: see `renew`.
    """
    arguments = (who, life_s, int(repeat_s + KEPT_S), state, f"{now:.3f}", repeat_s, repeats)
    try:
        return int(await store.run_script(_CLAIM, (told_key(id),), arguments))
    except (StoreAway, StoreError):
        return MINE


def renew(store: Store, id: str, who: str, repeat_s: float, life_s: float) -> None:
    """`who` still sees this alert fire. Waits for nobody; without Redis it does nothing."""
    try:
        store.script_only(_RENEW, (told_key(id),), (who, life_s, int(repeat_s + KEPT_S)))
    except StoreAway:
        return
