import { defineConfig } from 'vite'

// `npm run dev` serves the page with hot reload and hands /api on to a server started by `histokit review STUDY`.
const server = process.env.HISTOKIT_SERVER ?? 'http://127.0.0.1:8000'

export default defineConfig({
  oxc: { jsx: { runtime: 'automatic', importSource: 'preact' } },
  server: { proxy: { '/api': { target: server, changeOrigin: true } } },
  build: {
    target: 'es2022',
    assetsInlineLimit: 0,           // a strict Content-Security-Policy: nothing inline
    modulePreload: { polyfill: false },
    reportCompressedSize: true,
  },
})
