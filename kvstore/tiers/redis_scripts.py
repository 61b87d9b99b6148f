# SPDX-License-Identifier: Apache-2.0
"""What the server itself does with values and their accounts, each script all or nothing (`redis_accounting`).

Scripts go as EVAL with their text and not as EVALSHA: inside the write's transaction an unknown hash would leave
a value without an account, and hashing a few hundred bytes costs the server a microsecond.
"""

from __future__ import annotations

ROOTS_PER_CALL = 64

# KEYS: registry, used, order, sizes, total of each part. ARGV: root, member, score, bytes of each part. Where it cannot
# account, for a key that holds something of another program, the values that were set before it go again.
ACCOUNT = """
local function account()
for i = 0, #ARGV / 4 - 1 do
  local roots, used, order, sizes, total = unpack(KEYS, 5 * i + 1, 5 * i + 5)
  local root, member, score, size = unpack(ARGV, 4 * i + 1, 4 * i + 4)
  local old = redis.call('HGET', sizes, member)
  if old ~= size then
    redis.call('HSET', sizes, member, size)
    redis.call('INCRBY', total, size - (old or 0))
    redis.call('INCRBY', used, size - (old or 0))
  end
  redis.call('ZADD', order, 'GT', score, member)
  redis.call('ZADD', roots, 'LT', score, root)
end
end
local fine, why = pcall(account)
if fine then return #ARGV / 4 end
for i = 0, #ARGV / 4 - 1 do
  redis.pcall('UNLINK', string.sub(KEYS[5 * i + 3], 1, -2) .. 'v:' .. ARGV[4 * i + 2])
end
return {err = type(why) == 'table' and why.err or 'WRONGTYPE ' .. tostring(why)}
"""

_FORGET = """
local function forget(value, member, order, sizes, total, used)
  local size = redis.call('HGET', sizes, member) or 0
  redis.call('UNLINK', value)
  redis.call('ZREM', order, member)
  redis.pcall('SREM', string.sub(order, 1, -2) .. 'f', member)
  redis.pcall('HDEL', string.sub(order, 1, -2) .. 'k', member)
  if redis.call('HDEL', sizes, member) == 1 then
    redis.call('DECRBY', total, size)
    redis.call('DECRBY', used, size)
  end
  return tonumber(size)
end
"""

# KEYS: used, order, sizes, total, then values. ARGV: 'all' or 'missing', then members.
REMOVE = (
    _FORGET
    + """
local bytes, count = 0, 0
for i = 2, #ARGV do
  local value = KEYS[i + 3]
  if ARGV[1] == 'all' or redis.call('EXISTS', value) == 0 then
    bytes = bytes + forget(value, ARGV[i], KEYS[2], KEYS[3], KEYS[4], KEYS[1])
    count = count + 1
  end
end
return {count, bytes}
"""
)

# Sets a root's place in the registry to where its coldest member is; takes a root without members out of it.
_SETTLE = """
local function settle(roots, root, order, total)
  local coldest = redis.call('ZRANGE', order, 0, 0, 'WITHSCORES')
  -- First what frees memory: a script that began so may go on where the server has none left.
  redis.call('ZREM', roots, root)
  if coldest[2] then
    redis.call('ZADD', roots, coldest[2], root)
  elseif (redis.call('GET', total) or '0') == '0' then
    redis.call('DEL', total)
  else
    redis.call('ZADD', roots, 'inf', root)
  end
end
"""

# KEYS: registry, used. ARGV: what a bucket's names begin with before its root, highest score to go, how many at most,
# roots or none for all. Returns members, bytes, and whether there may be more.
EVICT = (
    _FORGET
    + _SETTLE
    + f"""
local bytes, count, left = 0, 0, tonumber(ARGV[3])
local roots, all = {{ARGV[4]}}, not ARGV[4]
if all then
  roots = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2], 'LIMIT', 0, {ROOTS_PER_CALL})
end
for i = 5, #ARGV do
  local place = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if place and tonumber(place) <= tonumber(ARGV[2]) then roots[#roots + 1] = ARGV[i] end
end
for _, root in ipairs(roots) do
  if count == left then break end
  local at = ARGV[1] .. root
  local order, sizes, total = at .. ':z', at .. ':s', at .. ':b'
  local members = redis.call('ZRANGEBYSCORE', order, '-inf', ARGV[2], 'LIMIT', 0, left - count)
  for _, member in ipairs(members) do
    bytes = bytes + forget(at .. ':v:' .. member, member, order, sizes, total, KEYS[2])
  end
  count = count + #members
  settle(KEYS[1], root, order, total)
end
return {{count, bytes, (count == left or (all and #roots == {ROOTS_PER_CALL})) and 1 or 0}}
"""
)

# KEYS: registry. ARGV: what a bucket's names begin with before its root, how many, roots or none for all. Returns the
# score below which nothing was left out, then score, bytes, score, bytes, … of members, in no order.
COLDEST = (
    _SETTLE
    + f"""
local want, num = tonumber(ARGV[2]), 0
local reply, horizon = {{''}}, 'inf'
local roots, places = {{}}, {{}}
for i = 3, #ARGV do
  local place = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if place then places[#places + 1] = {{ARGV[i], place}} end
end
table.sort(places, function(one, other) return tonumber(one[2]) < tonumber(other[2]) end)
for i, place in ipairs(places) do roots[2 * i - 1], roots[2 * i] = place[1], place[2] end
if #ARGV == 2 then roots = redis.call('ZRANGE', KEYS[1], 0, {ROOTS_PER_CALL}, 'WITHSCORES') end
for i = 1, #roots, 2 do
  if num >= want or i > 2 * {ROOTS_PER_CALL} then
    if tonumber(roots[i + 1]) < tonumber(horizon) then horizon = roots[i + 1] end
    break
  end
  local at = ARGV[1] .. roots[i]
  local coldest = redis.call('ZRANGE', at .. ':z', 0, want - 1, 'WITHSCORES')
  for j = 1, #coldest, 2 do
    reply[#reply + 1] = coldest[j + 1]
    reply[#reply + 1] = redis.call('HGET', at .. ':s', coldest[j]) or '0'
  end
  num = num + #coldest / 2
  if #coldest == 2 * want and tonumber(coldest[#coldest]) < tonumber(horizon) then horizon = coldest[#coldest] end
  if coldest[2] ~= roots[i + 1] then settle(KEYS[1], roots[i], at .. ':z', at .. ':b') end
end
reply[1] = horizon
return reply
"""
)


# KEYS: order, forks. ARGV: member. What lies there and is no set is another program's.
FORK = """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
local kind = redis.call('TYPE', KEYS[2]).ok
if kind ~= 'set' and kind ~= 'none' then redis.call('UNLINK', KEYS[2]) end
return redis.call('SADD', KEYS[2], ARGV[1])
"""

# KEYS: registry, order. ARGV: root, then score and member of each. Lowers, never raises.
COOL = """
local cooled = 0
for i = 2, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 'XX', 'LT', ARGV[i], ARGV[1])
  cooled = cooled + redis.call('ZADD', KEYS[2], 'XX', 'LT', 'CH', ARGV[i], ARGV[i + 1])
end
return cooled
"""
