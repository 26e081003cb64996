// Signatures of webhooks, checked here: the secret does not leave the page.

const encoder = new TextEncoder();

const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const base64 = (bytes) => btoa(String.fromCharCode(...bytes));

function fromBase64(text) {
  try {
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  } catch {
    return null;
  }
}

function joined(prefix, body) {
  const start = encoder.encode(prefix);
  const all = new Uint8Array(start.length + body.length);
  all.set(start);
  all.set(body, start.length);
  return all;
}

async function hmac(key, data) {
  const imported = await crypto.subtle.importKey("raw", key, { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  return new Uint8Array(await crypto.subtle.sign("HMAC", imported, data));
}

const header = (headers, name) => {
  const found = Object.keys(headers).find((known) => known.toLowerCase() === name);
  return found ? headers[found].join(",") : null;
};

/** Each provider: how it is recognised, what it signs, and the signatures that a request has. */
const PROVIDERS = {
  github: {
    name: "GitHub",
    field: "x-hub-signature-256",
    read: (headers) => ({
      prefix: "",
      signatures: [header(headers, "x-hub-signature-256").replace(/^sha256=/, "").toLowerCase()],
      encode: hex,
    }),
  },
  stripe: {
    name: "Stripe",
    field: "stripe-signature",
    read: (headers) => {
      const parts = header(headers, "stripe-signature").split(",").map((part) => part.trim().split("="));
      const time = parts.find(([key]) => key === "t")?.[1];
      return {
        prefix: `${time}.`,
        time,
        signatures: parts.filter(([key]) => key === "v1").map(([, value]) => (value ?? "").toLowerCase()),
        encode: hex,
      };
    },
  },
  slack: {
    name: "Slack",
    field: "x-slack-signature",
    read: (headers) => {
      const time = header(headers, "x-slack-request-timestamp");
      return {
        prefix: `v0:${time}:`,
        time,
        signatures: [header(headers, "x-slack-signature").replace(/^v0=/, "").toLowerCase()],
        encode: hex,
      };
    },
  },
  standard: {
    name: "Standard Webhooks",
    field: "webhook-signature",
    key: (secret) => fromBase64(secret.replace(/^whsec_/, "")),
    read: (headers) => {
      const time = header(headers, "webhook-timestamp");
      return {
        prefix: `${header(headers, "webhook-id")}.${time}.`,
        time,
        signatures: header(headers, "webhook-signature")
          .split(/[ ]+/)
          .filter((signature) => signature.startsWith("v1,"))
          .map((signature) => signature.slice(3)),
        encode: base64,
      };
    },
  },
};

export const providers = () => Object.entries(PROVIDERS).map(([id, { name }]) => [id, name]);

/** The provider whose field a request has. */
export function recognise(headers) {
  return Object.keys(PROVIDERS).find((id) => header(headers, PROVIDERS[id].field) !== null) ?? null;
}

/** Whether a request's signature is right, and a sentence about it. */
export async function check(id, secret, headers, body) {
  const provider = PROVIDERS[id];
  const fault = (text) => ({ isRight: false, text });
  if (!crypto.subtle) return fault("The browser signs only for pages from localhost or over https.");
  if (header(headers, provider.field) === null) return fault(`The request has no ${provider.field} field.`);
  const key = provider.key ? provider.key(secret) : encoder.encode(secret);
  if (!key) return fault("The secret is not Base64.");
  if (!key.length) return fault("Enter the secret.");
  const { prefix, signatures, encode, time } = provider.read(headers);
  const expected = encode(await hmac(key, joined(prefix, body)));
  if (!signatures.includes(expected)) {
    return fault("The signature does not match: the secret is another one, or the body was changed.");
  }
  const age = time ? Math.round(Date.now() / 1000 - Number(time)) : null;
  const note = age === null ? "" : ` Its timestamp is ${age} s old.`;
  return { isRight: true, text: `The signature matches.${note}` };
}
