// The CloudFront Function under Node, with events as "CloudFront Functions event structure" in CloudFront's developer guide has them.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { load, MAX_BYTES, source } from './cloudfront.mjs';

function event({ method = 'GET', uri = '/my-app/hello', raw, headers = {}, ip = '203.0.113.9' } = {}) {
    const fields = { host: { value: 'tunnel.example.com' }, accept: { value: '*/*' } };
    for (const [name, value] of Object.entries(headers)) {
        fields[name] = { value };
    }
    return {
        version: '1.0',
        context: { distributionDomainName: 'd111111abcdef8.cloudfront.net', distributionId: 'EDFDVBD6EXAMPLE', eventType: 'viewer-request', requestId: 'x' },
        viewer: { ip },
        request: { method, uri, querystring: {}, headers: fields, cookies: {}, rawQueryString: () => raw },
    };
}

function run(input) {
    const selected = [];
    const handler = load({ selectRequestOriginById: (id) => selected.push(id) });
    return { request: handler(input), selected };
}

const handshake = { 'sec-websocket-key': 'dGhlIHNhbXBsZSBub25jZQ==', 'sec-websocket-version': '13' };

test('a request goes to the function URL, with the host and the address of its visitor', () => {
    const { request, selected } = run(event({ uri: '/my-app/a%2Fb', raw: 'x=%20&y' }));
    assert.deepEqual(selected, []);
    assert.equal(request.uri, '/my-app/a%2Fb');
    assert.equal(request.headers['x-tunnel-host'].value, 'tunnel.example.com');
    assert.equal(request.headers['x-tunnel-address'].value, '203.0.113.9');
    assert.equal(request.headers['x-tunnel-target'], undefined);
});

test('what a visitor claims in the same fields is replaced or removed', () => {
    const forged = { 'x-tunnel-host': 'other.example.com', 'x-tunnel-address': '192.0.2.1', 'x-tunnel-target': '/other' };
    const { request } = run(event({ headers: forged, ip: '2001:db8::1' }));
    assert.equal(request.headers['x-tunnel-host'].value, 'tunnel.example.com');
    assert.equal(request.headers['x-tunnel-address'].value, '2001:db8::1');
    assert.equal(request.headers['x-tunnel-target'], undefined);
});

test('a handshake goes to the WebSocket API, with its path and query in a field', () => {
    for (const [raw, target] of [[undefined, '/my-app/a%2Fb'], ['', '/my-app/a%2Fb'], ['token=a%20b&x', '/my-app/a%2Fb?token=a%20b&x']]) {
        const { request, selected } = run(event({ uri: '/my-app/a%2Fb', raw, headers: { ...handshake, 'x-tunnel-target': '/other' } }));
        assert.deepEqual(selected, ['sockets']);
        assert.equal(request.uri, '/visitors');
        assert.deepEqual(request.querystring, {});
        assert.equal(request.headers['x-tunnel-target'].value, target);
        assert.equal(request.headers['sec-websocket-key'].value, handshake['sec-websocket-key']);
    }
});

test('only GET can be a handshake', () => {
    const { request, selected } = run(event({ method: 'POST', headers: handshake }));
    assert.deepEqual(selected, []);
    assert.equal(request.uri, '/my-app/hello');
});

test('the function fits into CloudFront', () => {
    assert.ok(Buffer.byteLength(source) <= MAX_BYTES);
});
