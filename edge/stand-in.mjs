// Stands in for CloudFront on this machine: runs the function of this directory for each request, and does with its answer what
// CloudFront does with that of template.yaml's distribution.
//
//     node edge/stand-in.mjs REQUESTS_ORIGIN SOCKETS_ORIGIN SECRET
//
// The origins are http:// addresses, and a path of theirs comes before that of each request. Prints its own address.
import { randomUUID } from 'node:crypto';
import http from 'node:http';
import { load } from './cloudfront.mjs';

// OriginReadTimeout of the distribution.
const READ_TIMEOUT_MS = 120_000;
// What CloudFront does not pass on ("Request and response behavior for custom origins" in its developer guide).
const NOT_PASSED_ON = new Set(['connection', 'keep-alive', 'proxy-connection', 'te', 'trailer', 'transfer-encoding', 'upgrade']);

const [requests, sockets, secret] = process.argv.slice(2);
const origins = { requests: new URL(requests), sockets: new URL(sockets) };

/** Runs the function, and returns where the request goes, as what. */
function route(viewerRequest) {
    const [uri, ...rest] = viewerRequest.url.split('?');
    const raw = rest.length > 0 ? rest.join('?') : undefined;
    const headers = {};
    for (const [name, values] of Object.entries(viewerRequest.headersDistinct)) {
        if (!NOT_PASSED_ON.has(name)) {
            headers[name] = { value: values.join(name === 'cookie' ? '; ' : ',') };
        }
    }
    const querystring = {};
    const request = { method: viewerRequest.method, uri, querystring, headers, cookies: {}, rawQueryString: () => raw };
    let id = 'requests';
    const cf = { selectRequestOriginById: (selected) => { id = selected; } };
    const event = { version: '1.0', context: { eventType: 'viewer-request' }, viewer: { ip: viewerRequest.socket.remoteAddress.replace(/^::ffff:/, '') }, request };
    const answer = load(cf)(event);
    const origin = origins[id];
    const fields = Object.fromEntries(Object.entries(answer.headers).map(([name, { value }]) => [name, value]));
    Object.assign(fields, { host: origin.host, via: '1.1 stand-in.cloudfront.net (CloudFront)', 'x-amz-cf-id': randomUUID(), 'x-tunnel-edge': secret });
    const query = answer.querystring === querystring && raw !== undefined ? `?${raw}` : '';
    // Names below localhost are this machine.
    const hostname = origin.hostname.endsWith('localhost') ? '127.0.0.1' : origin.hostname;
    return { hostname, port: origin.port, method: answer.method, path: origin.pathname.replace(/\/$/, '') + answer.uri + query, headers: fields, agent: false };
}

function passedOn(response) {
    return Object.entries(response.headersDistinct)
        .filter(([name]) => !NOT_PASSED_ON.has(name))
        .flatMap(([name, values]) => values.flatMap((value) => [name, value]));
}

const server = http.createServer((viewerRequest, viewerResponse) => {
    const originRequest = http.request(route(viewerRequest), (response) => {
        viewerResponse.writeHead(response.statusCode, passedOn(response));
        viewerResponse.flushHeaders();
        response.pipe(viewerResponse);
        // A response that breaks off must not look complete.
        response.on('error', () => viewerResponse.destroy());
    });
    originRequest.setTimeout(READ_TIMEOUT_MS, () => originRequest.destroy(new Error('the origin says nothing')));
    originRequest.on('error', () => {
        if (!viewerResponse.headersSent) {
            viewerResponse.writeHead(504).end();
        } else {
            viewerResponse.destroy();
        }
    });
    viewerRequest.pipe(originRequest);
});

server.on('upgrade', (viewerRequest, viewer, first) => {
    const options = route(viewerRequest);
    Object.assign(options.headers, { connection: 'Upgrade', upgrade: 'websocket' });
    const originRequest = http.request(options);
    const say = (response) => {
        const fields = passedOn(response);
        const lines = [`HTTP/1.1 ${response.statusCode} ${response.statusMessage}`];
        for (let at = 0; at < fields.length; at += 2) {
            lines.push(`${fields[at]}: ${fields[at + 1]}`);
        }
        return lines;
    };
    viewer.on('error', () => originRequest.destroy());
    originRequest.on('upgrade', (response, origin, firstOfOrigin) => {
        const lines = [...say(response), 'connection: Upgrade', 'upgrade: websocket'];
        const offered = viewerRequest.headers['sec-websocket-protocol'];
        // MiniStack leaves out the subprotocol that $connect was answered with.
        if (offered && !response.headers['sec-websocket-protocol']) {
            lines.push(`sec-websocket-protocol: ${offered.split(',')[0].trim()}`);
        }
        viewer.write(`${lines.join('\r\n')}\r\n\r\n`);
        viewer.write(firstOfOrigin);
        origin.write(first);
        origin.on('error', () => viewer.destroy());
        viewer.on('error', () => origin.destroy());
        origin.pipe(viewer).pipe(origin);
    });
    originRequest.on('response', (response) => {
        viewer.write(`${[...say(response), 'connection: close'].join('\r\n')}\r\n\r\n`);
        response.pipe(viewer);
    });
    originRequest.on('error', () => viewer.destroy());
    originRequest.end();
});

server.listen(0, '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}`));
