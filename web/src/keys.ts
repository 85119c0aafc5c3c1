// The keyboard of the review page: which key means what, and when a key is none of ours.
import { useEffect, useRef } from 'preact/hooks'

export const keyTable: [string, string][] = [
  ['0 – 9', 'set the score and go to the next measure (numpad too)'],
  ['[  ]', 'one step down, one step up (also −, +)'],
  ['Tab', 'next measure (Shift: the one before)'],
  ['Backspace', 'clear the score'],
  ['Enter', 'take over the draft where nothing is scored yet; when all is scored, on to the next unscored'],
  ['n  p', 'next, previous unscored picture'],
  ['→  ←', 'next, previous picture of the list (also PageDown, PageUp)'],
  ['u', 'undo the last change'],
  ['g', 'where the model looked'],
  ['x', 'flag for discussion'],
  ['?', 'this help'],
]

const typing = (t: EventTarget | null) => t instanceof HTMLElement
  && (t.isContentEditable || t instanceof HTMLTextAreaElement || t instanceof HTMLSelectElement
    || (t instanceof HTMLInputElement && t.type !== 'range' && t.type !== 'checkbox' && t.type !== 'radio'))

/** The key's name, or null where it belongs to a field, a dialog, a control or the browser. */
export function ownKey(e: KeyboardEvent): string | null {
  const chord = (e.ctrlKey || e.altKey) && !e.getModifierState('AltGraph')      // [ and ] need AltGr on many keyboards
  if (e.defaultPrevented || chord || e.metaKey || e.isComposing || typing(e.target)) return null
  if (document.querySelector('dialog[open]')) return null
  const control = (e.target as HTMLElement | null)?.closest?.('button:not([role=radio]), a, summary, input')
  if (control && ['Enter', ' ', 'ArrowLeft', 'ArrowRight'].includes(e.key)) return null
  if (e.repeat && !['[', ']', 'ArrowLeft', 'ArrowRight'].includes(e.key)) return null
  const digit = /^Numpad(\d)$/.exec(e.code) ?? (e.shiftKey ? null : /^Digit(\d)$/.exec(e.code))
  return digit ? digit[1]! : e.key        // by place: the numpad without NumLock, keyboards whose digits need Shift
}

/** Listens on the whole page; the handler says whether it has used the key. */
export function useKeys(handler: (key: string, e: KeyboardEvent) => boolean): void {
  const latest = useRef(handler)
  latest.current = handler
  useEffect(() => {
    const down = (e: KeyboardEvent) => {
      const key = ownKey(e)
      if (key !== null && latest.current(key, e)) e.preventDefault()
    }
    addEventListener('keydown', down)
    return () => removeEventListener('keydown', down)
  }, [])
}
