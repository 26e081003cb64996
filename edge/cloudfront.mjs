// Loads the CloudFront Function of this directory outside CloudFront.
import { readFileSync } from 'node:fs';

// "Quotas on CloudFront Functions" in CloudFront's developer guide.
export const MAX_BYTES = 10 * 1024;
export const source = readFileSync(new URL('viewer-request.js', import.meta.url), 'utf8');

const IMPORT = "import cf from 'cloudfront';\n";

/** The function's handler, with `cf` as the module `cloudfront`. */
export function load(cf) {
    if (!source.startsWith(IMPORT)) {
        throw new Error('viewer-request.js must begin with the import of cloudfront');
    }
    return new Function('cf', `'use strict';${source.slice(IMPORT.length)}; return handler;`)(cf);
}
