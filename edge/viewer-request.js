import cf from 'cloudfront';

// Runs in CloudFront for every request of a visitor, before it goes to the function URL or to the visitors' WebSocket API. Both are
// addressed by their own host names, so what the visitor used travels in header fields. The functions believe these only beside the
// secret that CloudFront adds to what it sends to an origin.
function handler(event) {
    const request = event.request;
    const headers = request.headers;
    const target = request.uri + query(request);
    headers['x-tunnel-host'] = { value: headers.host.value };
    headers['x-tunnel-address'] = { value: event.viewer.ip };
    delete headers['x-tunnel-target'];
    // CloudFront does not show the Upgrade field.
    if (request.method === 'GET' && headers['sec-websocket-key']) {
        // A WebSocket API has no paths: only the name of its stage.
        headers['x-tunnel-target'] = { value: target };
        request.uri = '/visitors';
        request.querystring = {};
        cf.selectRequestOriginById('sockets');
    }
    return request;
}

function query(request) {
    const raw = request.rawQueryString();
    return raw === undefined || raw === '' ? '' : '?' + raw;
}
