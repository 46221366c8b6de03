// A device with a page table of its own that reads and writes the memory of processes, as its standard input says.
//
// One JSON object a line; the answer has the same `id`.  Bytes travel as base64.
//
//   {"id": 1, "op": "mirror", "process": 1}
//   {"id": 2, "op": "read", "process": 1, "address": 140737488281600, "length": 4}
//   {"id": 3, "op": "write", "process": 1, "address": 140737488281600, "data": "AAAAAA=="}
//   {"id": 4, "op": "unmirror", "process": 1}
//   {"id": 5, "op": "state"}                     what was heard, and which mirrors were lost
//
// It faults in what is missing, and answers an event when it no longer uses what the event takes.  It ends when its
// standard input does.

"use strict";

const readline = require("node:readline");
const util = require("node:util");
const { Session, CallError } = require("./session.js");

const PAGE = 4096n;
const VALID = 0b111n;
const WRITE = 1n << 4n;
const REMEMBERED_EVENTS = 256;

const pageOf = (address) => address - (address % PAGE);

function pagesOf(address, length) {
  const pages = [];
  for (let page = pageOf(address); page < address + length; page += PAGE) pages.push(page);
  return pages;
}

/** One little-endian uint64 for each page. */
function entriesOf(pages, value) {
  const bytes = Buffer.alloc(pages.length * 8);
  pages.forEach((page, index) => bytes.writeBigUInt64LE(value(page), index * 8));
  return bytes;
}

/** One process as the device sees it. */
class Mirror {
  constructor(id) {
    this.id = id;
    this.table = new Map(); // page -> entry, as the device's hardware would walk it
    this.underWay = new Set(); // accesses that were started and have not ended
    this.recent = []; // the last events that took something: {sequence, event}
    this.forgotten = 0n; // results that include no later event than this one cannot be judged any more
    this.heard = 0n; // the last event whose handling has begun
    this.released = false;
    this.lost = "";
  }

  missing(pages, write) {
    const wanted = (entry) => entry & VALID && (!write || entry & WRITE);
    return pages.filter((page) => !wanted(this.table.get(page) || 0n));
  }

  /** entry &= pteMask in the event's ranges. */
  apply(sequence, event) {
    const mask = BigInt(event.pteMask);
    for (const [page, entry] of this.table) {
      if (!overlaps(event, page, page + PAGE)) continue;
      const left = entry & mask;
      if (left & VALID) this.table.set(page, left);
      else this.table.delete(page);
    }
    this.recent.push({ sequence, event });
    if (this.recent.length > REMEMBERED_EVENTS) this.forgotten = this.recent.shift().sequence;
  }

  /** Whether an event that came later takes back what a fault returned. */
  isStale(pages, lastSequence) {
    if (lastSequence < this.forgotten) return true;
    return this.recent.some(
      ({ sequence, event }) => sequence > lastSequence && pages.some((page) => overlaps(event, page, page + PAGE)),
    );
  }
}

function overlaps(event, start, end) {
  const { starts, ends } = event.ranges || { starts: [], ends: [] };
  return starts.some((first, index) => BigInt(first) < end && start < BigInt(ends[index]));
}

class Device {
  constructor(target, name) {
    this.name = name;
    this.mirrors = new Map(); // by mirror id
    this.byProcess = new Map();
    this.heard = [];
    this.rejected = [];
    this.unclaimed = []; // events of mirrors whose registration has not been answered yet
    this.target = target;
  }

  /** Open a session and register the device: in the beginning, and when the session before has broken. */
  async open() {
    this.session = new Session(this.target, this.name, {
      onEvent: (event) => this.onEvent(event),
      onViolation: (violation) => this.onViolation(violation),
      onEnd: (why) => this.onEnd(why),
    });
    await this.session.welcome;
    const [{ deviceId }] = await this.session.make("registerDevice", { name: this.name });
    this.id = deviceId;
  }

  // ---- what the daemon says

  onEvent(event) {
    event.mirrorIds.forEach((mirrorId, index) => {
      const mirror = this.mirrors.get(mirrorId);
      const sequence = event.eventSequences[index];
      if (mirror) this.update(mirror, BigInt(sequence), event);
      else this.unclaimed.push({ mirrorId, sequence, event });
    });
  }

  async update(mirror, sequence, event) {
    mirror.heard = sequence;
    this.heard.push({ type: event.type.replace("EVENT_TYPE_", ""), operation: event.operation });
    if (event.type === "EVENT_TYPE_RELEASE") {
      mirror.table.clear();
      mirror.released = true;
    } else {
      mirror.apply(sequence, event);
    }
    // Nothing new uses what the event takes; what was started may still.
    const all = event.type === "EVENT_TYPE_RELEASE";
    const started = [...mirror.underWay].filter((access) => all || overlaps(event, access.start, access.end));
    await Promise.allSettled(started.map((access) => access.ended));
    this.session.acknowledge(mirror.id, String(sequence), event.wantsAnswer);
  }

  onViolation(violation) {
    this.rejected.push(violation.rule);
    const mirror = this.mirrors.get(violation.mirrorId);
    if (mirror && violation.rule.startsWith("DEVICE_LOST")) this.lose(mirror, violation.rule);
  }

  onEnd(why) {
    for (const mirror of this.mirrors.values()) this.lose(mirror, why);
    this.mirrors.clear();
  }

  lose(mirror, why) {
    mirror.lost = mirror.lost || why;
    mirror.table.clear();
  }

  // ---- what its user says

  async mirror({ process: processId }) {
    if (this.session.ended) await this.open();
    const request = { deviceId: this.id, processId, noFaultEvents: true };
    const [{ mirrorId }] = await this.session.make("registerMirror", request);
    const mirror = new Mirror(mirrorId);
    this.mirrors.set(mirrorId, mirror);
    this.byProcess.set(processId, mirror);
    const early = this.unclaimed.filter((one) => one.mirrorId === mirrorId);
    this.unclaimed = this.unclaimed.filter((one) => one.mirrorId !== mirrorId);
    for (const { sequence, event } of early) this.update(mirror, BigInt(sequence), event);
    return { mirror: Number(mirrorId) };
  }

  async unmirror({ process: processId }) {
    const mirror = this.byProcess.get(processId);
    this.byProcess.delete(processId);
    if (!mirror || mirror.lost) return {};
    await this.session.make("unregisterMirror", { mirrorId: mirror.id });
    this.mirrors.delete(mirror.id);
    return {};
  }

  async read({ process: processId, address, length }) {
    const pieces = { addresses: [String(address)], lengths: [String(length)] };
    const [{ data }] = await this.access(processId, BigInt(address), BigInt(length), false, "deviceRead", pieces);
    return { data: data.toString("base64") };
  }

  async write({ process: processId, address, data: text }) {
    const data = Buffer.from(text, "base64");
    const pieces = { addresses: [String(address)], lengths: [String(data.length)], data };
    await this.access(processId, BigInt(address), BigInt(data.length), true, "deviceWrite", pieces);
    return {};
  }

  async state() {
    const lost = {};
    for (const mirror of this.mirrors.values()) if (mirror.lost) lost[mirror.id] = mirror.lost;
    return { heard: this.heard, rejected: this.rejected, lost };
  }

  // ---- the engine

  async access(processId, address, length, write, name, pieces) {
    const mirror = this.find(processId);
    const pages = pagesOf(address, length);
    for (let missing = mirror.missing(pages, write); missing.length; missing = mirror.missing(pages, write)) {
      await this.fault(mirror, missing, write);
    }
    // Between the look at the table and the start of the access nothing else runs.
    const access = { start: address, end: address + length };
    const entries = entriesOf(pages, (page) => mirror.table.get(page));
    const manner = { entries, heardSequence: String(mirror.heard) };
    access.ended = this.session.make(name, { mirrorId: mirror.id, ...pieces, ...manner });
    mirror.underWay.add(access);
    try {
      return await access.ended;
    } finally {
      mirror.underWay.delete(access);
    }
  }

  async fault(mirror, missing, write) {
    const pages = entriesOf(missing, (page) => page);
    const parts = await this.session.make("fault", { mirrorId: mirror.id, pages, write });
    const last = parts[parts.length - 1];
    if (mirror.isStale(missing, BigInt(last.lastEventSequence))) return;
    const entries = Buffer.concat(parts.map((part) => part.entries));
    missing.forEach((page, index) => {
      const entry = entries.readBigUInt64LE(index * 8);
      if (entry & VALID) mirror.table.set(page, entry);
    });
  }

  find(processId) {
    const mirror = this.byProcess.get(processId);
    if (!mirror) throw new CallError({ errno: 3, reason: "NO_SUCH_OBJECT", message: `process ${processId}` });
    if (mirror.lost) throw new CallError({ errno: 19, reason: "DEVICE_LOST", message: mirror.lost });
    if (mirror.released) throw new CallError({ errno: 19, reason: "NO_SUCH_OBJECT", message: "released" });
    return mirror;
  }
}

const OPERATIONS = ["mirror", "unmirror", "read", "write", "state"];

async function answer(device, line) {
  const { id, op, ...request } = JSON.parse(line);
  try {
    if (!OPERATIONS.includes(op)) throw new CallError({ errno: 95, reason: "INVALID_ARGUMENT", message: op });
    return { id, result: await device[op](request) };
  } catch (error) {
    if (!(error instanceof CallError)) throw error;
    const errno = util.getSystemErrorName(-error.errno);
    return { id, error: { errno, reason: error.reason, message: error.message } };
  }
}

async function main() {
  const socket = process.env.HMMD_SOCKET;
  const target = socket.startsWith("/") ? `unix:${socket}` : socket;
  const device = new Device(target, process.env.HMMD_DEVICE || "javascript");
  await device.open();
  const say = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
  say({ ready: { device: Number(device.id) } });
  const lines = readline.createInterface({ input: process.stdin });
  lines.on("line", (line) => answer(device, line).then(say));
  lines.on("close", () => device.session.close());
}

main().catch((error) => {
  process.stderr.write(`driver.js: ${error.message}\n`);
  process.exitCode = 1;
});
