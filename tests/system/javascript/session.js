// A session with hmmd: one stream that carries events, answers and calls, as session.proto describes it.

"use strict";

const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const PROTOS = process.env.HMMD_PROTO || path.join(__dirname, "..", "..", "..", "proto");
const PROTOCOL_VERSION = 1;

/** Why a call failed: the errno of a CallResult, with its reason and message. */
class CallError extends Error {
  constructor(result) {
    super(result.message || result.reason);
    this.errno = result.errno;
    this.reason = result.reason;
    this.address = result.address;
  }
}

class Session {
  /**
   * Handlers:
   *   onEvent(event)      a change that some mirrors of this session have to answer
   *   onViolation(one)    an answer that was rejected; DEVICE_LOST is how a driver hears that it was fenced
   *   onEnd(why)          the stream has ended: nothing of it is valid any more
   */
  constructor(target, name, handlers) {
    const options = { longs: String, enums: String, defaults: true, oneofs: true, includeDirs: [PROTOS] };
    const files = loader.loadSync("hmm_proto/v1/session.proto", options);
    const { SessionService } = grpc.loadPackageDefinition(files).hmm.v1;
    this.handlers = handlers;
    this.waiting = new Map();
    this.lastRequest = 0;
    this.ended = false;
    this.stub = new SessionService(target, grpc.credentials.createInsecure());
    this.welcome = new Promise((resolve, reject) => {
      this.welcomed = resolve;
      this.refused = reject;
    });
    this.welcome.catch(() => {}); // whoever waits for it hears of the failure
    this.call = this.stub.Session();
    this.call.on("data", (batch) => this.take(batch));
    this.call.on("error", (error) => this.end(error.message));
    this.call.on("end", () => this.end("the daemon has ended the stream"));
    this.call.write({ hello: { protocolVersion: PROTOCOL_VERSION, pid: process.pid, name } });
  }

  /** Make one call of DeviceService; `name` is its field in SessionCall. */
  make(name, request) {
    if (this.ended) return Promise.reject(new CallError({ errno: 19, reason: "DEVICE_LOST" }));
    this.lastRequest += 1;
    const requestId = String(this.lastRequest);
    return new Promise((resolve, reject) => {
      this.waiting.set(requestId, { name, parts: [], resolve, reject });
      this.call.write({ calls: [{ requestId, [name]: request }] });
    });
  }

  /** Tell the daemon that one mirror has finished one event. */
  acknowledge(mirrorId, sequence, wantsAnswer) {
    if (this.ended) return;
    const answers = wantsAnswer ? [{ mirrorId, eventSequence: sequence }] : [];
    const single = wantsAnswer ? {} : { singleMirrorIds: [mirrorId], singleSequences: [sequence] };
    this.call.write({ acknowledgements: { ...single, answers } });
  }

  /** Leave in good order. */
  async close() {
    if (this.ended) return;
    const ended = new Promise((resolve) => this.call.once("end", resolve));
    this.call.write({ bye: { reason: "closed" } });
    this.call.end();
    await ended;
    this.stub.close();
  }

  take(batch) {
    if (batch.welcome) this.welcomed(batch.welcome);
    for (const event of batch.events) this.handlers.onEvent(event);
    for (const reply of batch.replies) this.takeReply(reply);
    for (const violation of batch.violations) this.handlers.onViolation(violation);
  }

  takeReply(reply) {
    const call = this.waiting.get(reply.requestId);
    if (!call) return;
    const response = reply[reply.reply];
    if (reply.reply === "notMade") {
      this.waiting.delete(reply.requestId);
      call.reject(new CallError(response));
      return;
    }
    call.parts.push(response);
    if (reply.more) return;
    this.waiting.delete(reply.requestId);
    if (response.result && response.result.errno) call.reject(new CallError(response.result));
    else call.resolve(call.parts);
  }

  end(why) {
    if (this.ended) return;
    this.ended = true;
    const lost = new CallError({ errno: 19, reason: "DEVICE_LOST", message: why });
    this.refused(lost);
    for (const call of this.waiting.values()) call.reject(lost);
    this.waiting.clear();
    this.handlers.onEnd(why);
  }
}

module.exports = { Session, CallError };
